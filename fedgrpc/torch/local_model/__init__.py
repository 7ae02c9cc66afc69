"""Local models in PyTorch: slicing, pruning, clustering, quantization and number formats."""

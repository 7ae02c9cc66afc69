"""Local models from the global one: number formats, sub-models, pruning, clustering, quantization."""

"""Learning tasks with PyTorch; absolute imports keep `import torch` PyTorch itself."""

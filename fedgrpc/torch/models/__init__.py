"""The ready-made models, by name. Each is a plain `nn.Module` that takes a float batch and gives logits."""

from fedgrpc.torch.models.registry import MODEL_NAMES, build_model

__all__ = ["MODEL_NAMES", "build_model"]

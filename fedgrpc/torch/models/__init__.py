"""Ready-made models, by name. Each is a plain `nn.Module` from a float batch to logits."""

from fedgrpc.torch.models.registry import MODEL_NAMES, build_model

__all__ = ["MODEL_NAMES", "build_model"]

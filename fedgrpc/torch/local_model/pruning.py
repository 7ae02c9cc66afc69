"""Magnitude pruning: masks of the weights that are kept (Han et al., arXiv 1506.02626).

A new mask is made of the global model's weights each round, so pruning follows the training (PruneFL, arXiv
1909.12326). Whole channels are pruned by a sub-model of rule "magnitude" instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgrpc.submodels.plan import Pruning, matches


def prunable(weights: Mapping[str, Tensor], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Choose float tensors of two axes or more by name; biases and normalization are left alone."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if tensor.dim() >= 2 and tensor.is_floating_point() and matches(name, layers)
    }


def keep_masks(weights: Mapping[str, Tensor], pruning: Pruning) -> dict[str, Tensor]:
    """Make a mask (bool) of the values that each pruned tensor keeps, at least one in each."""
    chosen = prunable(weights, pruning.layers)
    if pruning.scope == "layer":
        return {name: _largest(tensor.detach().abs(), 1 - pruning.ratio) for name, tensor in chosen.items()}
    if not chosen:
        return {}
    together = torch.cat([tensor.detach().abs().reshape(-1) for tensor in chosen.values()])
    kept = torch.split(_largest(together, 1 - pruning.ratio), [tensor.numel() for tensor in chosen.values()])
    masks = {}
    for (name, tensor), part in zip(chosen.items(), kept, strict=True):
        masks[name] = part.reshape(tensor.shape) if part.any() else _largest(tensor.detach().abs(), 0.0)
    return masks


def _largest(magnitudes: Tensor, fraction: float) -> Tensor:
    """Mark exactly the `fraction` of the elements that are largest; position decides between equal ones."""
    flat = magnitudes.reshape(-1)
    count = max(1, round(fraction * flat.numel()))
    least = flat.kthvalue(flat.numel() - count + 1).values
    kept = flat > least
    ties = (flat == least).nonzero().reshape(-1)[: count - int(kept.sum())]
    kept[ties] = True
    return kept.reshape(magnitudes.shape)

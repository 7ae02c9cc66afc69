"""Magnitude pruning: which weights are kept (Han et al., arXiv 1506.02626).

A mask is made anew from the global model's weights each round, so what is pruned follows the training (PruneFL,
arXiv 1909.12326). Whole channels are pruned by cutting them out: a sub-model of rule "magnitude".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgrpc.submodels.plan import Pruning, matches


def prunable(weights: Mapping[str, Tensor], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """The float tensors of two axes or more with such a name: biases and normalization are left alone."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if tensor.dim() >= 2 and tensor.is_floating_point() and matches(name, layers)
    }


def keep_masks(weights: Mapping[str, Tensor], pruning: Pruning) -> dict[str, Tensor]:
    """For each tensor that is pruned, where it keeps its values (bool); at least one stays in each."""
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
    """True at the `fraction` of the elements that are largest, exactly as many; ties go by position."""
    flat = magnitudes.reshape(-1)
    count = max(1, round(fraction * flat.numel()))
    least = flat.kthvalue(flat.numel() - count + 1).values
    kept = flat > least
    ties = (flat == least).nonzero().reshape(-1)[: count - int(kept.sum())]
    kept[ties] = True
    return kept.reshape(magnitudes.shape)

"""Weights and activations of k bits, with straight-through gradients (Jacob et al., arXiv 1712.05877)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantized_weights(weights: Tensor, bits: int, per_channel: bool = True) -> Tensor:
    """Round to multiples of max|w| / (2^(bits-1) - 1), per output channel (axis 0) or for the whole tensor."""
    top = 2 ** (bits - 1) - 1
    over = tuple(range(1 if per_channel else 0, weights.dim()))
    scale = (weights.abs().amax(dim=over, keepdim=True) if over else weights.abs()) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weights / scale).round().clamp(-top, top) * scale


def quantized_activations(values: Tensor, bits: int) -> Tensor:
    """Quantize affinely with one scale for the batch, whose range is widened to represent zero exactly.

    The range is the batch's own, not a running one, so that there is no statistic to average over a federation.
    """
    steps = 2**bits - 1
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    scale = (high - low) / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round()
    return ((values / scale + zero).round().clamp(0, steps) - zero) * scale


def straight_through(values: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` with the gradient of `values` (arXiv 1308.3432)."""
    return values + (quantized - values).detach()

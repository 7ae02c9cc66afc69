"""Weight of an update's coordinates by the noise that its number format adds.

    weight[c] = 1 / (1 + noise[c] / s2)        inverse variance, relative to an update without such noise

An update has the variance s2 of its own, and rounding adds `noise`. The best unbiased mean of several updates
weighs each by 1 / (s2 + noise). Full precision keeps its weight exactly, so a fleet without small formats gives
the same bits with and without these weights.

A rounding adds a step of the format's grid squared, over 12 (uniform, arXiv 1712.05877 and others). A number
format rounds the weights in each optimizer step. Weights quantized to a few bits are rounded once, since they are
trained in full precision.
"""

from __future__ import annotations

import re

import numpy as np

from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, matches

# Bits of the significand with its hidden one, and the smallest normal exponent.
_FLOATS = {
    "float24": (17, -62),
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "float8_e4m3": (4, -6),
    "float8_e4m3fn": (4, -6),
    "float8_e5m2": (3, -14),
}
_FULL = ("float64", "float32")
# The least share of an update's mean square that counts as its own variance, even if noise would explain all of
# it.
_LEAST_SHARE = 0.01


def rounding_noise(
    plan: LocalModelPlan, name: str, values: np.ndarray, steps: int, axes: int | None = None
) -> np.ndarray | None:
    """Return the variance that the plan's formats add to each weight of a tensor that had `values`; None: none.

    `axes` is the number of dimensions of the tensor, where `values` are only those that a mask has kept.
    """
    noise: np.ndarray | None = None
    if plan.arithmetic is not None and (spacing := _spacing(plan.arithmetic, values)) is not None:
        noise = max(1, steps) * spacing**2 / 12
    bits = 0 if plan.quantization is None else plan.quantization.weight_bits
    if plan.quantization is None or not bits or not matches(name, plan.quantization.layers):
        return noise
    if (values.ndim if axes is None else axes) < 2:
        return noise
    each_channel = tuple(range(1, values.ndim)) or None
    step = np.abs(values).max(axis=each_channel, keepdims=True, initial=0.0) / (2 ** (bits - 1) - 1)
    return np.broadcast_to(step**2 / 12, values.shape) + (0.0 if noise is None else noise)


def inverse_variance_weight(noise: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Return a weight above 0, at most 1, for each coordinate of an update `delta` with this variance of noise.

    s2 is the part of the delta's mean square that the noise does not explain.
    """
    if not delta.size:
        return np.ones(noise.shape)
    square = float(np.mean(np.square(delta, dtype=np.float64)))
    own = max(square - float(noise.mean()), _LEAST_SHARE * square)
    if own <= 0:
        return np.ones(noise.shape)
    weight: np.ndarray = 1 / (1 + noise / own)
    return weight


def _spacing(arithmetic: Arithmetic, values: np.ndarray) -> np.ndarray | None:
    """Return the distance of neighbouring numbers of the format at each of `values`; None: negligible."""
    name = arithmetic.format
    if name in _FULL:
        return None
    if match := re.fullmatch(r"fixed\d{1,2}\.(-?\d{1,2})", name):
        return np.full(values.shape, 2.0 ** -int(match[1]))
    if match := re.fullmatch(r"e(\d{1,2})s(\d{1,2})", name):
        bits, least = int(match[2]), 2 - 2 ** (int(match[1]) - 1)
    else:
        bits, least = _FLOATS[name]
    _, exponents = np.frexp(np.abs(values).astype(np.float64))
    # frexp's fraction is from 1/2; a weight of 0 has the spacing of the smallest numbers.
    exponents = np.where(values == 0, least, np.maximum(exponents - 1, least))
    spacing: np.ndarray = np.ldexp(1.0, exponents - (bits - 1))
    return spacing

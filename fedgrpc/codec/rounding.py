"""Scalar quantization: finding the step (from the RMS, a wanted distortion, a sample), and stochastic rounding.

Expectations over the rounding are exact, so finding a step draws no random numbers.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.codec.values import as_float32, pieces
from fedgrpc.errors import EncodeError

SAMPLE = 8192
C_RANGE = (0.01, 64.0)
POOL = 65536


def rms(values: Array) -> float:
    """Return the root mean square of a flat float array, 0 for an empty one. Raises EncodeError unless finite."""
    total = 0.0
    for piece in pieces(values.size):
        wide = as_float32(values[piece]).astype(np.float64)
        # Not dot: BLAS would wake its threads for so few elements, and let them spin.
        total += float(np.einsum("i,i->", wide, wide))
    if not np.isfinite(total):
        raise EncodeError("a tensor holds NaN, infinity or a value out of range; it cannot be quantized")
    return float(np.sqrt(total / max(1, values.size)))


def sample(values: Array, size: int = SAMPLE) -> Array:
    """Return absolute values of about `size` elements spread over the array, float64."""
    stride = max(1, values.size // size)
    # A stride that shares a factor with the row length would always meet the same columns.
    picked = np.arange(0, values.size, stride)
    picked = np.minimum(picked + picked // stride * 7 % stride, values.size - 1) if stride > 1 else picked
    return np.abs(values[picked].astype(np.float64))


def share_of_zeros(magnitudes: Array, step: float, rounding: str) -> float:
    """Return the expected share of symbols that are zero."""
    if rounding == "nearest":
        return float((magnitudes <= step / 2).mean())
    return float(np.maximum(0, 1 - magnitudes / step).mean())


def distortion(magnitudes: Array, step: float, rounding: str) -> float:
    """Return the expected |x - decoded|^2 / |x|^2."""
    scaled = magnitudes / step
    if rounding == "nearest":
        error = (scaled - np.rint(scaled)) ** 2
    else:
        fraction = scaled - np.floor(scaled)
        error = fraction * (1 - fraction)
    return float(error.sum() / max((scaled**2).sum(), 1e-300))


def step_for_distortion(magnitudes: Array, wanted: float, rounding: str) -> float:
    """Return the step, within `C_RANGE`, with the wanted expected distortion, by bisection."""
    low, high = C_RANGE
    for _ in range(30):
        middle = float(np.sqrt(low * high))
        if distortion(magnitudes, middle, rounding) > wanted:
            high = middle
        else:
            low = middle
    return low


class Dither:
    """Uniform float32 numbers on [0, 1) for one tensor of `size` elements, read in pieces of `piece`.

    Drawing a fresh float32 per element costs more than all the rest of the quantizer. Instead a pool is drawn once
    per tensor, and each piece of the tensor reads it from its own random offset. Every element's number is still
    exactly uniform and independent of the value it rounds, so rounding stays unbiased. Only elements of different
    pieces that meet the same number are correlated.
    """

    def __init__(self, rng: np.random.Generator, size: int, piece: int) -> None:
        self._pool = rng.random(min(size, max(POOL, 4 * piece)), dtype=np.float32)
        self._reused = size > self._pool.size
        self._piece = piece
        self._offsets: list[int] = []
        if self._reused:
            top, count = self._pool.size - piece, -(-size // piece)
            self._offsets = rng.integers(0, top, size=count, endpoint=True).tolist()

    def at(self, start: int, count: int) -> Array:
        """Return numbers for the `count` elements from `start`, which is a multiple of `piece`."""
        offset = self._offsets[start // self._piece] if self._reused else start
        return self._pool[offset : offset + count]

"""Cheap random numbers for stochastic rounding.

Drawing a fresh float32 per element costs more than all the rest of the quantizer. Instead a pool is
drawn once per tensor, and each piece of the tensor reads it from its own random offset. Every element's
number is still exactly uniform on [0, 1) and independent of the value it rounds, so rounding stays
unbiased; only elements of different pieces that meet the same number are correlated.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array

POOL = 65536


class Dither:
    """Uniform float32 numbers on [0, 1) for one tensor of `size` elements, read in pieces of `piece`."""

    def __init__(self, rng: np.random.Generator, size: int, piece: int) -> None:
        self._pool = rng.random(min(size, max(POOL, 4 * piece)), dtype=np.float32)
        self._reused = size > self._pool.size
        self._piece = piece
        self._offsets: list[int] = []
        if self._reused:
            top, count = self._pool.size - piece, -(-size // piece)
            self._offsets = rng.integers(0, top, size=count, endpoint=True).tolist()

    def at(self, start: int, count: int) -> Array:
        """Numbers for the `count` elements from `start`, which is a multiple of `piece`."""
        offset = self._offsets[start // self._piece] if self._reused else start
        return self._pool[offset : offset + count]

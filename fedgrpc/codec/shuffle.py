"""Byte shuffle: all lowest bytes of the elements first, then all next ones, up to the highest.

The exponents of a tensor resemble each other and its mantissas do not, so zstd finds more in the planes
than in the elements (Blosc's and HDF5's shuffle filter). Planes are cut and joined by shifts of whole
words, which numpy runs as SIMD, unlike a transposition of bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.codec.values import pieces


def shuffle(values: Array) -> Array:
    """Byte planes of a flat little-endian array, as uint8; plane k holds byte k of every element."""
    width = values.dtype.itemsize
    words = values.view(f"<u{width}")
    planes = np.empty((width, values.size), np.uint8)
    for piece in pieces(values.size):
        for k in range(width):
            planes[k, piece] = (words[piece] >> words.dtype.type(8 * k)).astype(np.uint8)
    return planes.reshape(-1)


def unshuffle(planes: Array, dtype: np.dtype[Any]) -> Array:
    """The flat array of `dtype` whose byte planes these are."""
    width = dtype.itemsize
    rows = planes.reshape(width, -1)
    words = np.empty(rows.shape[1], f"<u{width}")
    for piece in pieces(words.size):
        joined = rows[0, piece].astype(words.dtype)
        for k in range(1, width):
            joined |= rows[k, piece].astype(words.dtype) << words.dtype.type(8 * k)
        words[piece] = joined
    return words.view(dtype)

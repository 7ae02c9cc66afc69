"""Byte shuffle: the lowest bytes of all elements of a block, then the next ones, up to the highest.

The exponents of a tensor resemble each other and its mantissas do not, so zstd finds more in these planes than in
the elements (Blosc's and HDF5's shuffle filter). A plane of a whole block is as long as a block of zstd, which
thus gets a code of its own. Every frame holds all planes, so the first frame tells whether compression pays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.codec.values import pieces

BLOCK = 131072


def shuffle(values: Array) -> Array:
    """Return the byte planes of a flat little-endian array, block by block of 131072 elements, as uint8."""
    width = values.dtype.itemsize
    words, out = values.view(f"<u{width}"), np.empty(values.nbytes, np.uint8)
    for block in pieces(values.size, BLOCK):
        planes = out[block.start * width : block.stop * width].reshape(width, -1)
        _cut(words[block], planes)
    return out


def unshuffle(content: Array, dtype: np.dtype[Any]) -> Array:
    """Return the flat array of `dtype` that has these byte planes."""
    width = dtype.itemsize
    words = np.empty(content.size // width, f"<u{width}")
    for block in pieces(words.size, BLOCK):
        planes = content[block.start * width : block.stop * width].reshape(width, -1)
        _join(planes, words[block])
    return words.view(dtype)


def _cut(words: Array, planes: Array) -> None:
    # Shifts of whole words run as SIMD in numpy. A transposition of bytes does not.
    for piece in pieces(words.size):
        for k in range(planes.shape[0]):
            planes[k, piece] = (words[piece] >> words.dtype.type(8 * k)).astype(np.uint8)


def _join(planes: Array, words: Array) -> None:
    for piece in pieces(words.size):
        joined = planes[0, piece].astype(words.dtype)
        for k in range(1, planes.shape[0]):
            joined |= planes[k, piece].astype(words.dtype) << words.dtype.type(8 * k)
        words[piece] = joined

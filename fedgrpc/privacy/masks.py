"""Masks of a vector as streams, and words of any width packed to the bit.

The rule: all tensors of an update are one vector, in one order, and each mask is one stream over it. So a vector
can be masked, packed and summed a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from typing import Final

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.errors import CorruptError
from fedgrpc.privacy.streams import RandomStream, word_dtype

# A word that is shifted by up to 7 bits has to fit 64.
MAX_PACKED_BITS: Final = 56


class Masks:
    """Masks of one vector as streams, added in the order in which the vector is drawn."""

    def __init__(self, signed_keys: Iterable[tuple[bytes, int]], bits: int) -> None:
        self._streams = [(RandomStream(key), sign) for key, sign in signed_keys]
        self._bits = bits

    def add_to(self, values: Array) -> Array:
        """Return the next piece `values` plus its masks, modulo 2^bits, in the dtype of `word_dtype`."""
        dtype = word_dtype(self._bits)
        total = values.astype(dtype).reshape(-1)
        mask = np.empty_like(total)
        for stream, sign in self._streams:
            # Whole words: what is above the low bits goes with the modulus.
            stream.fill(mask)
            np.add(total, mask, out=total) if sign > 0 else np.subtract(total, mask, out=total)
        total &= dtype.type((1 << self._bits) - 1)
        return total.reshape(values.shape)


def pack_words(words: Array, bits: int) -> Array:
    """Return `words` (unsigned, below 2^bits) as ceil(count * bits / 8) bytes, least significant bit first."""
    merged: Array = np.zeros(-(-words.size // 8) * 8, word_dtype(bits))
    merged[: words.size] = words.reshape(-1)
    for size, width in _fields(bits)[:-1]:
        low = (1 << width) - 1
        merged = merged.view(word_dtype(2 * size))
        # The upper of two fields moves down, right behind the lower one.
        merged = (merged & low) | ((merged >> (size - width)) & (low << width))
    packed = np.zeros((-(-words.size // 8), bits), np.uint8)
    lanes = merged.reshape(len(packed), len(_lanes(bits)))
    for lane, (start, shift, touched) in enumerate(_lanes(bits)):
        # Little-endian bytes of the shifted field; neighbours share a byte where one ends and the next begins.
        shifted = (lanes[:, lane].astype("<u8") << np.uint64(shift)).view(np.uint8).reshape(-1, 8)
        packed[:, start : start + touched] |= shifted[:, :touched]
    return packed.reshape(-1)[: packed_bytes(words.size, bits)]


def unpack_words(packed: Array, count: int, bits: int) -> Array:
    """Return `count` words of `bits` bits from the bytes of `pack_words`, in the dtype of `word_dtype`.

    Raises CorruptError unless there are exactly as many bytes as that takes, with zeros after the last word.
    """
    *fields, (size, width) = _fields(bits)
    if packed.size != packed_bytes(count, bits) or (count * bits % 8 and int(packed[-1]) >> (count * bits % 8)):
        raise CorruptError(f"{packed.size} bytes are not {count} words of {bits} bits")
    rows = np.zeros((-(-count // 8), bits), np.uint8)
    rows.reshape(-1)[: packed.size] = packed
    lanes = np.empty((len(rows), len(_lanes(bits))), word_dtype(size))
    for lane, (start, shift, touched) in enumerate(_lanes(bits)):
        wide = np.zeros((len(rows), 8), np.uint8)
        wide[:, :touched] = rows[:, start : start + touched]
        field = wide.view("<u8").reshape(-1) >> np.uint64(shift)
        lanes[:, lane] = field & np.uint64((1 << width) - 1)
    merged: Array = lanes.reshape(-1)
    for size, width in reversed(fields):
        low = (1 << width) - 1
        upper = (merged & (low << width)) << (size - width)
        merged = ((merged & low) | upper).view(word_dtype(size))
    return merged[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` words of `bits` bits take."""
    return (count * bits + 7) // 8


def _fields(bits: int) -> list[tuple[int, int]]:
    """Return the steps in which words of `bits` bits become lanes: (bits of room, bits used) of each.

    At each step two become one of twice the size, while one that is shifted to its place in a byte fits 64 bits.
    """
    if not 1 <= bits <= MAX_PACKED_BITS:
        raise ValueError(f"packed words have 1 to {MAX_PACKED_BITS} bits, not {bits}")
    fields = [(8 * word_dtype(bits).itemsize, bits)]
    while (size := 2 * fields[-1][0]) <= 64 and (width := 2 * fields[-1][1]) + 8 - gcd(width, 8) <= 64:
        fields.append((size, width))
    return fields


def _lanes(bits: int) -> list[tuple[int, int, int]]:
    """Return first byte, shift and bytes touched of each lane of eight words, which take `bits` bytes together."""
    _, width = _fields(bits)[-1]
    places = (divmod(at, 8) for at in range(0, 8 * bits, width))
    return [(start, shift, (shift + width + 7) // 8) for start, shift in places]

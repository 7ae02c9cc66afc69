"""Masks of a vector as streams, and words of any width packed to the bit.

The rule: all tensors of an update are one vector, in one order, and each mask is one stream over it. So a vector
can be masked, packed and summed a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        total = values.astype(dtype)
        for stream, sign in self._streams:
            mask = stream.words(values.size, self._bits).reshape(values.shape)
            np.add(total, mask, out=total) if sign > 0 else np.subtract(total, mask, out=total)
        masked: Array = total & dtype.type((1 << self._bits) - 1)
        return masked


def pack_words(words: Array, bits: int) -> Array:
    """Return `words` (unsigned, below 2^bits) as ceil(count * bits / 8) bytes, least significant bit first."""
    lanes = _lanes(bits)
    groups = np.zeros((-(-words.size // 8), 8), np.uint64)
    groups.reshape(-1)[: words.size] = words.reshape(-1)
    packed = np.zeros((groups.shape[0], bits), np.uint8)
    for lane, (start, shift, width) in enumerate(lanes):
        # Little-endian bytes of the shifted word; neighbours share a byte where one ends and the next begins.
        shifted = (groups[:, lane] << np.uint64(shift)).astype("<u8").view(np.uint8).reshape(-1, 8)
        packed[:, start : start + width] |= shifted[:, :width]
    return packed.reshape(-1)[: packed_bytes(words.size, bits)]


def unpack_words(packed: Array, count: int, bits: int) -> Array:
    """Return `count` words of `bits` bits from the bytes of `pack_words`, in the dtype of `word_dtype`.

    Raises CorruptError unless there are exactly as many bytes as that takes, with zeros after the last word.
    """
    lanes = _lanes(bits)
    if packed.size != packed_bytes(count, bits) or (count * bits % 8 and int(packed[-1]) >> (count * bits % 8)):
        raise CorruptError(f"{packed.size} bytes are not {count} words of {bits} bits")
    rows = np.zeros((-(-count // 8), bits), np.uint8)
    rows.reshape(-1)[: packed.size] = packed
    words = np.empty((rows.shape[0], 8), word_dtype(bits))
    for lane, (start, shift, width) in enumerate(lanes):
        wide = np.zeros((rows.shape[0], 8), np.uint8)
        wide[:, :width] = rows[:, start : start + width]
        lane_words = wide.view("<u8").reshape(-1) >> np.uint64(shift)
        words[:, lane] = lane_words & np.uint64((1 << bits) - 1)
    return words.reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` words of `bits` bits take."""
    return (count * bits + 7) // 8


def _lanes(bits: int) -> list[tuple[int, int, int]]:
    """Return first byte, shift and bytes touched of each of eight words, which take `bits` bytes together."""
    if not 1 <= bits <= MAX_PACKED_BITS:
        raise ValueError(f"packed words have 1 to {MAX_PACKED_BITS} bits, not {bits}")
    return [(lane * bits // 8, lane * bits % 8, (lane * bits % 8 + bits + 7) // 8) for lane in range(8)]

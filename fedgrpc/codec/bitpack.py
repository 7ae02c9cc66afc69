"""Codes of 1, 2, 3, 4 or 6 bits packed into bytes, least significant bit first.

Element i takes bits [i*n, (i+1)*n) of the stream; bit j of the stream is bit j % 8 of byte j // 8. The
last byte is filled with zero bits. Packing works on whole machine words (SIMD within a register): bytes
that each hold one code are folded into words by shift and or, and back.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array

# bits -> (codes per word, bytes that they pack into); a word holds one code in each of its bytes
_GROUPS: dict[int, tuple[int, int]] = {2: (4, 1), 3: (8, 3), 4: (2, 1), 6: (4, 3)}


def _folds(bits: int) -> tuple[tuple[int, int, int], ...]:
    """(shift, mask of the fields that stay, mask of those that move down) for each halving of a word."""
    lanes = _GROUPS[bits][0]
    folds, lane, field = [], 8, bits
    while lanes > 1:
        stay = sum(((1 << field) - 1) << (2 * lane * i) for i in range(lanes // 2))
        folds.append((lane - field, stay, stay << lane))
        lanes, lane, field = lanes // 2, 2 * lane, 2 * field
    return tuple(folds)


_FOLDS = {bits: _folds(bits) for bits in _GROUPS}


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Array, bits: int) -> Array:
    """Pack uint8 codes (each below 2**bits) into `packed_size` bytes."""
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    per_word, packed_bytes = _GROUPS[bits]
    words = _padded(codes, per_word).view(f"<u{per_word}")
    scalar = words.dtype.type
    for shift, stay, move in _FOLDS[bits]:
        words = (words & scalar(stay)) | ((words & scalar(move)) >> scalar(shift))
    low_bytes = words.view(np.uint8).reshape(words.size, per_word)[:, :packed_bytes]
    return low_bytes.reshape(-1)[: packed_size(codes.size, bits)]


def unpack(packed: Array, count: int, bits: int) -> Array:
    """The first `count` codes of `packed_size(count, bits)` packed bytes, as uint8."""
    if bits == 8:
        return packed[:count]
    if bits == 1:
        return np.unpackbits(packed, count=count, bitorder="little")
    per_word, packed_bytes = _GROUPS[bits]
    rows = _padded(packed, packed_bytes).reshape(-1, packed_bytes)
    wide = np.zeros((rows.shape[0], per_word), np.uint8)
    wide[:, :packed_bytes] = rows
    words = wide.reshape(-1).view(f"<u{per_word}")
    scalar = words.dtype.type
    for shift, stay, move in reversed(_FOLDS[bits]):
        words = (words & scalar(stay)) | ((words << scalar(shift)) & scalar(move))
    return words.view(np.uint8)[:count]


def _padded(codes: Array, multiple: int) -> Array:
    missing = -codes.size % multiple
    return np.pad(codes, (0, missing)) if missing else np.ascontiguousarray(codes)

"""Positions of rare elements as a stream of bytes that zstd codes within about 1 % of their entropy.

A stream lists increasing positions by the gap before each one. Byte 255 passes over `run` positions;
any other byte passes over its gap and marks the next position. With flags, a byte is 2 * gap + flag and
run is 127, else it is the gap and run is 255. If every element is marked with probability p, the gaps are
geometric and need H(p)/p bits each: H(p) bits for every element, which Huffman's code of zstd reaches
closely for p from 0.4 down to 0.005; at 0.001 the passes cost a third more, of a hundredth of a bit.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.errors import CorruptError

PASS = 255
RUN, RUN_FLAGGED = 255, 127


def write_marks(positions: Array, flags: Array | None = None) -> Array:
    """Stream of increasing int64 positions, each with a flag (bool) if flags are given; uint8."""
    gaps = np.diff(positions, prepend=-1) - 1
    if flags is None:
        return write_counts(gaps)
    return _write(gaps, RUN_FLAGGED, flags)


def read_marks(stream: Array, size: int) -> Array:
    """Positions below `size` of a stream without flags; raises CorruptError."""
    _check_length(stream, size, RUN)
    return _bounded(np.cumsum(read_counts(stream) + 1) - 1, size)


def read_flagged_marks(stream: Array, size: int) -> tuple[Array, Array]:
    """Positions below `size`, and their flags as bool; raises CorruptError."""
    _check_length(stream, size, RUN_FLAGGED)
    last = _terminators(stream)
    if (stream == PASS - 1).any():
        raise CorruptError("a stream of marks holds byte 254, which has no meaning")
    steps = np.where(last, (stream >> 1) + np.uint8(1), np.uint8(RUN_FLAGGED))
    positions = np.cumsum(steps, dtype=np.int64)[last] - 1
    return _bounded(positions, size), (stream[last] & 1).astype(bool)


def write_counts(counts: Array) -> Array:
    """Stream of non-negative integers, each as count // 255 bytes 255 and one byte count % 255."""
    return _write(counts, RUN, None)


def read_counts(stream: Array) -> Array:
    """The non-negative integers of a stream, int64; raises CorruptError."""
    last = _terminators(stream)
    return np.diff(np.cumsum(stream, dtype=np.int64)[last], prepend=0)


def _write(counts: Array, run: int, flags: Array | None) -> Array:
    passing = np.flatnonzero(counts >= run)
    final = counts.astype(np.uint8)
    final[passing] = counts[passing] % run
    if flags is not None:
        final = (final << np.uint8(1)) | flags.view(np.uint8)
    # Almost no byte is a pass: they are inserted rather than every byte's place computed.
    return np.insert(final, np.repeat(passing, counts[passing] // run), PASS) if passing.size else final


def _terminators(stream: Array) -> Array:
    last: Array = stream != PASS
    if stream.size and not last[-1]:
        raise CorruptError("a stream of marks or counts ends within one")
    return last


def _check_length(stream: Array, size: int, run: int) -> None:
    """Positions are eight times as large as their bytes: none is computed for a stream that cannot fit."""
    if stream.size > size + size // run:
        raise CorruptError(f"a stream of {stream.size} bytes marks positions among only {size}")


def _bounded(positions: Array, size: int) -> Array:
    if positions.size and positions[-1] >= size:
        raise CorruptError(f"a stream marks position {positions[-1]} of {size}")
    return positions

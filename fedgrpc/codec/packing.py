"""Small integers as bytes: packed into a fixed number of bits, or as the positions of the few that matter.

Packed: codes of 1, 2, 3, 4 or 6 bits, least significant bit first. Element i takes bits [i*n, (i+1)*n) of the
stream; bit j of the stream is bit j % 8 of byte j // 8. The last byte is filled with zero bits.

Marks: a stream lists increasing positions by the gap before each one. Byte 255 passes over `run` positions; any
other byte passes over its gap and marks the next position. With flags, a byte is 2 * gap + flag and run is 127,
else it is the gap and run is 255. If every element is marked with probability p, the gaps are geometric and need
H(p)/p bits each: H(p) bits for every element. Huffman's code of zstd gets within about 1 % of that for p from 0.4
down to 0.005. At 0.001 the passes cost a third more, of a hundredth of a bit.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.errors import CorruptError

# Packing works on whole machine words (SIMD within a register): bytes that each hold one code are folded into
# words by shift and or, and back.
# bits -> (codes per word, bytes that they pack into); a word holds one code in each of its bytes
_GROUPS: dict[int, tuple[int, int]] = {2: (4, 1), 3: (8, 3), 4: (2, 1), 6: (4, 3)}

PASS = 255
RUN, RUN_FLAGGED = 255, 127
# No encoder writes a symbol of 2^22 and more, so no count is larger either.
MAX_COUNT = 1 << 22
_PIECE_BYTES = 1 << 14


def _folds(bits: int) -> tuple[tuple[int, int, int], ...]:
    """Return (shift, mask of fields that stay, mask of fields that move down) for each halving of a word."""
    lanes = _GROUPS[bits][0]
    folds, lane, field = [], 8, bits
    while lanes > 1:
        stay = sum(((1 << field) - 1) << (2 * lane * i) for i in range(lanes // 2))
        folds.append((lane - field, stay, stay << lane))
        lanes, lane, field = lanes // 2, 2 * lane, 2 * field
    return tuple(folds)


_FOLDS = {bits: _folds(bits) for bits in _GROUPS}


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
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
    # Each step halves the lanes: the fields of every second lane move down beside those of the one below.
    for shift, stay, move in _FOLDS[bits]:
        words = (words & scalar(stay)) | ((words & scalar(move)) >> scalar(shift))
    low_bytes = words.view(np.uint8).reshape(words.size, per_word)[:, :packed_bytes]
    return low_bytes.reshape(-1)[: packed_size(codes.size, bits)]


def unpack(packed: Array, count: int, bits: int) -> Array:
    """Return the first `count` codes of `packed_size(count, bits)` packed bytes, as uint8."""
    if bits == 8:
        return packed[:count]
    if bits == 1:
        return np.unpackbits(packed, count=count, bitorder="little")
    per_word, packed_bytes = _GROUPS[bits]
    rows = _padded(packed, packed_bytes).reshape(-1, packed_bytes)
    # Packed bytes fill only a part of a word, so each group gets a word before its fields are spread.
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


def write_marks(positions: Array, flags: Array | None = None) -> Array:
    """Return the stream of increasing int64 positions, each with a flag (bool) if flags are given."""
    gaps = np.diff(positions, prepend=-1) - 1
    if flags is None:
        return write_counts(gaps)
    return _stream_of(gaps, RUN_FLAGGED, flags)


class MarkReader:
    """Reads the positions of a stream in order, a bounded number of bytes at a time, however long it is."""

    def __init__(self, stream: Array, *, flagged: bool = False) -> None:
        """Raises CorruptError for a stream that ends within a gap."""
        _check_end(stream)
        self._stream = stream
        self._flagged = flagged
        self._run = RUN_FLAGGED if flagged else RUN
        self._read_bytes = 0
        self._passed = 0
        self._first = 0
        self._positions = np.empty(0, np.int64)
        self._flags = np.empty(0, np.bool_)

    def among(self, count: int) -> tuple[Array, Array]:
        """Return which of the next `count` elements are marked, relative to the first, and their flags."""
        stop = self._first + count
        while self._passed < stop and self._read_bytes < self._stream.size:
            self._read()
        positions, flags = self._taken(int(np.searchsorted(self._positions, stop)))
        start, self._first = self._first, stop
        return positions - start, flags

    def take(self, count: int) -> Array:
        """Return the positions of the next `count` marks. Raises CorruptError if there are fewer."""
        while self._positions.size < count and self._read_bytes < self._stream.size:
            self._read()
        if self._positions.size < count:
            raise CorruptError("a stream has fewer marks than expected")
        return self._taken(count)[0]

    def finish(self) -> None:
        """Raise CorruptError if marks are left."""
        if self._positions.size or self._read_bytes < self._stream.size:
            raise CorruptError("a stream marks more positions than there are")

    def _taken(self, count: int) -> tuple[Array, Array]:
        positions, self._positions = self._positions[:count], self._positions[count:]
        flags, self._flags = self._flags[:count], self._flags[count:]
        return positions, flags

    def _read(self) -> None:
        piece = self._stream[self._read_bytes : self._read_bytes + _PIECE_BYTES]
        self._read_bytes += piece.size
        last = piece != PASS
        if self._flagged:
            # Twice a gap of 127, which is written as a pass: two bytes must not mean the same.
            if (piece == PASS - 1).any():
                raise CorruptError("a stream of marks holds byte 254, which has no meaning")
            steps = np.where(last, (piece >> 1) + np.uint8(1), np.uint8(RUN_FLAGGED))
            self._flags = np.concatenate([self._flags, (piece[last] & 1).astype(np.bool_)])
        else:
            # A pass skips as many positions as its byte says. Any other byte marks one more.
            steps = piece.astype(np.uint16) + last
        ends = np.cumsum(steps, dtype=np.int64) + self._passed
        self._passed = int(ends[-1])
        self._positions = np.concatenate([self._positions, ends[last] - 1])
        if not self._flagged:
            self._flags = np.zeros(self._positions.size, np.bool_)


class CountReader:
    """Reads the counts of a stream in order, a bounded number of bytes at a time. None is above `MAX_COUNT`."""

    def __init__(self, stream: Array) -> None:
        """Raises CorruptError for a stream that ends within a count."""
        _check_end(stream)
        self._stream = stream
        self._read_bytes = 0
        self._unfinished = 0
        self._counts = np.empty(0, np.int64)

    def take(self, count: int) -> Array:
        """Return the next `count` counts, int64. Raises CorruptError if there are fewer."""
        # Before anything is read: a byte ends one count at most.
        if self._counts.size + self._stream.size - self._read_bytes < count:
            raise CorruptError("a stream has fewer counts than expected")
        while self._counts.size < count and self._read_bytes < self._stream.size:
            self._read()
        if self._counts.size < count:
            raise CorruptError("a stream has fewer counts than expected")
        taken, self._counts = self._counts[:count], self._counts[count:]
        return taken

    def finish(self) -> None:
        """Raise CorruptError where counts are left."""
        if self._counts.size or self._read_bytes < self._stream.size:
            raise CorruptError("a stream has more counts than there are members")

    def _read(self) -> None:
        piece = self._stream[self._read_bytes : self._read_bytes + _PIECE_BYTES]
        self._read_bytes += piece.size
        sums = np.cumsum(piece, dtype=np.int64) + self._unfinished
        ends = sums[piece != PASS]
        found = np.diff(ends, prepend=0)
        # A piece may end within a count: what it has so far goes over to the next piece.
        self._unfinished = int(sums[-1]) - (int(ends[-1]) if ends.size else 0)
        if max(self._unfinished, int(found.max(initial=0))) > MAX_COUNT:
            raise CorruptError(f"a stream has a count above {MAX_COUNT}")
        self._counts = np.concatenate([self._counts, found])


def write_counts(counts: Array) -> Array:
    """Return the stream of non-negative integers: each is count // 255 bytes 255 and one byte count % 255."""
    return _stream_of(counts, RUN, None)


def _stream_of(counts: Array, run: int, flags: Array | None) -> Array:
    passing = np.flatnonzero(counts >= run)
    final = counts.astype(np.uint8)
    final[passing] = counts[passing] % run
    if flags is not None:
        final = (final << np.uint8(1)) | flags.view(np.uint8)
    # Almost no byte is a pass, so inserting them is cheaper than computing the place of every byte.
    return np.insert(final, np.repeat(passing, counts[passing] // run), PASS) if passing.size else final


def ends_in(stream: Array) -> int:
    """Count the marks or counts of a stream, in little memory."""
    pieces = (stream[start : start + _PIECE_BYTES] for start in range(0, stream.size, _PIECE_BYTES))
    return sum(int(np.count_nonzero(piece != PASS)) for piece in pieces)


def _check_end(stream: Array) -> None:
    if stream.size and stream[-1] == PASS:
        raise CorruptError("a stream of marks or counts ends within one")

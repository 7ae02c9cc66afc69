"""Coarse scalar quantization for an entropy coder (Mitchell et al., arXiv 2201.02664).

    d = c * RMS(x),   q = floor(x / d + u),  u ~ U[0, 1)  (stochastic, unbiased)  or  1/2 (nearest)

At c = 3 to 8 nearly all q are zero, and their entropy is 0.4 to 1.1 bit. zstd cannot spend less than a bit on a
byte, so the symbols are arranged in few bytes that each carry several bits:

    dense    q within [-m, m], m = (b-1)/2, as digits in base b, several to a byte (b = 255, 15, 5);
             larger ones follow as marks
    sparse   b = 1: no digits, every non-zero q is a mark (see `packing`)

Marks come in levels. Level 1 has the position and sign of every |q| > m, level j those members of level j - 1 with
|q| >= m + j, and the members of the last level carry the rest of |q| as a count. The base is chosen per tensor
from its share of zeros. After zstd level 1 the content was 1 to 4 % above the order-0 entropy of q for c from 0.1
to 30 and Laplace, Gauss and Student-3 data, and 6 % for Student-3 at c near 1 (`tools/bench/codec.py`).

    bytes: d float32, b uint8, levels uint8, zero uint16, the bytes of each level uint32, bytes of counts
    uint32 (only if there are levels), digits, levels, counts
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.packing import MAX_COUNT, CountReader, MarkReader, ends_in, write_counts, write_marks
from fedgrpc.codec.rounding import Dither, rms, sample, share_of_zeros, step_for_distortion
from fedgrpc.codec.values import as_float32, flat, pieces, require_float
from fedgrpc.errors import CorruptError, EncodeError, LayoutError, UsageError

DIGITS_PER_BYTE = {255: 1, 15: 2, 5: 3, 1: 0}
MAX_LEVELS = 8
LINK = "link"
_HEADER = struct.Struct("<fBBH")
_PIECE = 15360  # fits the cache and is a multiple of every number of digits in a byte
_DECODED_AT_ONCE = 2 * _PIECE
# A level costs 4 bytes of header, and its members need position bits that counts do not.
_FEWEST_FOR_A_LEVEL = 64
# The smallest normal float32. The inverse of a smaller one may overflow.
_SMALLEST_STEP = 2.0**-126


@dataclass(frozen=True)
class Entropy(TextForm):
    """Unbiased coarse quantization (arXiv 2201.02664). Use it with "+zstd": without, little is gained.

    Give the step as `c` (in units of the tensor's RMS), or as `distortion`, the wanted relative squared error
    |x - decoded|^2 / |x|^2, from which c is then found. The error of an element is below d. With a `budget`, c is
    the finest step, and the writer of the payload finds a coarser one if necessary (`codec.budget`). A budget is a
    number of bytes, or "link": what the sender's link carries in the time left.
    """

    name: ClassVar[str] = "entropy"
    lossless: ClassVar[bool] = False
    c: float = 3.0
    distortion: float = 0.0
    rounding: str = "stochastic"
    budget: str = ""

    def __post_init__(self) -> None:
        if not 0.01 <= self.c <= 1000:
            raise UsageError(f"c={self.c}; allowed: 0.01 to 1000 times the RMS")
        if not 0 <= self.distortion <= 100:
            raise UsageError(f"distortion={self.distortion}; allowed: 0 (use c) to 100")
        if self.rounding not in ("stochastic", "nearest"):
            raise UsageError(f"rounding={self.rounding}; allowed: stochastic, nearest")
        if self.budget not in ("", LINK) and not (self.budget.isascii() and self.budget.isdigit()):
            raise UsageError(f"budget={self.budget}; allowed: a number of bytes, or {LINK}")
        if self.budget and self.distortion:
            raise UsageError("distortion and budget both set the step; give one of them")

    @property
    def contractive(self) -> bool:
        """Unbiased rounding loses at most max(c^2/4, c - 1) of the square."""
        coarse = self.distortion >= 1 if self.distortion else self.c >= 2
        return self.rounding == "nearest" or not coarse

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        size = rms(values)
        step = np.float32(size * self._c(values, size))
        # All zeros, or so small that 1 / step would overflow: nothing but the header travels.
        if step < _SMALLEST_STEP:
            return _join(np.float32(0), 1, [], np.empty(0, np.uint8), np.empty(0, np.uint8))
        base = _base(share_of_zeros(sample(values), float(step), self.rounding))
        dither = Dither(rng, values.size, _PIECE) if self.rounding == "stochastic" else None
        digits, positions, symbols = _quantize(values, step, base, dither)
        levels, counts = _write_levels(positions, symbols, (base - 1) // 2)
        return _join(step, base, levels, counts, digits)

    @np.errstate(over="ignore")
    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        parts = _split(data, spec)
        out = np.empty(spec.size, spec.numpy_dtype)
        for piece, symbols in _symbols(parts, spec.size):
            out[piece] = np.multiply(symbols, parts.step, out=symbols)
        return out.reshape(spec.shape)

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        return _HEADER.size, max(_HEADER.size, spec.nbytes)

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """Return the quantized integers, flat, for the order-0 entropy."""
        out = np.empty(spec.size, np.int32)
        for piece, symbols in _symbols(_split(data, spec), spec.size):
            out[piece] = symbols
        return out

    def _c(self, values: Array, size: float) -> float:
        if not self.distortion or not size:
            return self.c
        return step_for_distortion(sample(values) / size, self.distortion, self.rounding)


def _digit_table(base: int) -> Array:
    """Return the symbols of every byte, little-endian in a word of 1, 2 or 4 bytes."""
    per_byte = DIGITS_PER_BYTE[base]
    width = (1, 2, 4)[per_byte - 1]
    table = np.zeros((256, width), np.int8)
    for place in range(per_byte):
        table[:, place] = np.arange(256) // base**place % base - (base - 1) // 2
    return table.view(f"<u{width}").reshape(-1)


_DIGIT_TABLES = {base: _digit_table(base) for base in (255, 15, 5)}


def _base(zeros: float) -> int:
    """Return the base for a share of zeros."""
    # The thresholds are where the measured curves (Laplace, Gauss, Student) of two bases cross.
    if zeros >= 0.64:
        return 1
    if zeros >= 0.47:
        return 5
    return 15 if zeros >= 0.2 else 255


def _quantize(values: Array, step: np.float32, base: int, dither: Dither | None) -> tuple[Array, Array, Array]:
    """Return the digit bytes, and positions and values of the symbols that digits cannot hold."""
    middle, per_byte = (base - 1) // 2, DIGITS_PER_BYTE[base]
    # One division for the tensor, and multiplications for its elements.
    inverse = np.float32(1) / step
    digits, positions, symbols = [], [], []
    for piece in pieces(values.size, _PIECE):
        scaled = as_float32(values[piece]) * inverse
        if dither is None:
            np.rint(scaled, out=scaled)
        else:
            np.floor(np.add(scaled, dither.at(piece.start, scaled.size), out=scaled), out=scaled)
        # Marks are rare, so they are collected piece by piece while the symbols are in the cache.
        marked = np.flatnonzero(np.abs(scaled) > middle if middle else scaled != 0)
        positions.append(marked + piece.start)
        symbols.append(scaled[marked])
        if per_byte:
            # A marked element has a digit too, which the mark overwrites in decoding. Zeros compress best.
            scaled[marked] = 0
            digits.append(_pack_digits((scaled + np.float32(middle)).astype(np.uint8), base, per_byte))
    flat_symbols = np.concatenate([np.empty(0, np.float32), *symbols])
    if flat_symbols.size and np.abs(flat_symbols).max() >= MAX_COUNT:
        raise EncodeError("a tensor holds a value too far above its RMS for this step")
    return (
        np.concatenate([np.empty(0, np.uint8), *digits]),
        np.concatenate([np.empty(0, np.int64), *positions]),
        flat_symbols.astype(np.int32),
    )


def _pack_digits(digits: Array, base: int, per_byte: int) -> Array:
    if missing := -digits.size % per_byte:
        digits = np.concatenate([digits, np.full(missing, (base - 1) // 2, np.uint8)])
    packed = digits[per_byte - 1 :: per_byte]
    for place in range(per_byte - 2, -1, -1):
        packed = packed * np.uint8(base) + digits[place::per_byte]
    return packed


def _from_digits(packed: Array, base: int) -> Array:
    """Return the symbols of digit bytes, int8, with those that only fill the last byte."""
    if packed.max(initial=0) >= base ** DIGITS_PER_BYTE[base]:
        raise CorruptError(f"a byte of base {base} digits is {packed.max()}")
    # One table entry holds all symbols of a byte, as the bytes of one word.
    symbols = _DIGIT_TABLES[base].take(packed).view(np.int8)
    # Three digits in base 5 lie in a word of four bytes: drop the last one.
    return symbols.reshape(-1, 4)[:, :3].reshape(-1) if base == 5 else symbols


def _write_levels(positions: Array, symbols: Array, middle: int) -> tuple[list[Array], Array]:
    if not positions.size:
        return [], np.empty(0, np.uint8)
    levels = [write_marks(positions, symbols < 0)]
    left = np.abs(symbols).astype(np.int64) - middle - 1
    # Stop once a level would have few members: what is left of them is cheap as counts.
    while len(levels) < MAX_LEVELS:
        members = np.flatnonzero(left)
        if members.size < _FEWEST_FOR_A_LEVEL:
            break
        levels.append(write_marks(members))
        left = left[members] - 1
    return levels, write_counts(left)


@dataclass(frozen=True)
class _Parts:
    """The parts of an encoded tensor. The streams are views of it."""

    step: np.float32
    base: int
    digits: Array
    levels: list[Array]
    counts: Array


def _symbols(parts: _Parts, size: int) -> Iterator[tuple[slice, Array]]:
    """Yield the symbols in order as float32, each piece valid until the next. Raises CorruptError."""
    per_byte = DIGITS_PER_BYTE[parts.base]
    beyond = _Beyond(parts)
    buffer = np.empty(min(size, _DECODED_AT_ONCE), np.float32)
    for piece in pieces(size, _DECODED_AT_ONCE):
        symbols = buffer[: piece.stop - piece.start]
        if per_byte:
            # A piece is a multiple of every number of digits in a byte: it never starts within one.
            packed = parts.digits[piece.start // per_byte : -(-piece.stop // per_byte)]
            symbols[:] = _from_digits(packed, parts.base)[: symbols.size]
        else:
            symbols[:] = 0
        places, values = beyond.among(symbols.size)
        symbols[places] = values
        yield piece, symbols
    beyond.finish()


class _Beyond:
    """The symbols that digits cannot hold, in order. Each level is read only as far as needed."""

    def __init__(self, parts: _Parts) -> None:
        self._middle = (parts.base - 1) // 2
        self._levels = [MarkReader(level, flagged=not number) for number, level in enumerate(parts.levels)]
        self._counts = CountReader(parts.counts)

    def among(self, count: int) -> tuple[Array, Array]:
        """Return places and values of such symbols among the next `count` elements."""
        if not self._levels:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        places, negative = self._levels[0].among(count)
        magnitude = np.full(places.size, self._middle + 1, np.int64)
        # A level marks members of the level before, so positions are looked up level by level.
        members = np.arange(places.size)
        for level in self._levels[1:]:
            members = members[level.among(members.size)[0]]
            magnitude[members] += 1
        magnitude[members] += self._counts.take(members.size)
        return places, np.where(negative, -magnitude, magnitude)

    def finish(self) -> None:
        """Raise CorruptError if marks or counts are left over."""
        for level in self._levels:
            level.finish()
        self._counts.finish()


def _join(step: np.float32, base: int, levels: list[Array], counts: Array, digits: Array) -> memoryview:
    parts = [_HEADER.pack(step, base, len(levels), 0)]
    if levels:
        parts.append(struct.pack(f"<{len(levels) + 1}I", *(part.size for part in (*levels, counts))))
    parts += [digits.tobytes(), *(level.tobytes() for level in levels), counts.tobytes()]
    return memoryview(b"".join(parts))


def _split(data: memoryview, spec: TensorSpec) -> _Parts:
    """Take an encoded tensor apart. Raises CorruptError or LayoutError."""
    if data.nbytes < _HEADER.size:
        raise LayoutError(f"tensor {spec.name!r} has {data.nbytes} encoded bytes, its header {_HEADER.size}")
    step, base, count, zero = _HEADER.unpack_from(data)
    # The last field has no meaning yet. Refused unless it is zero, it can get one later.
    if base not in DIGITS_PER_BYTE or count > MAX_LEVELS or zero or not 0 <= step < np.inf:
        raise CorruptError(f"tensor {spec.name!r} has an impossible header")
    # Every size below is checked against the bytes there are before a stream is read.
    at = _HEADER.size + (4 * (count + 1) if count else 0)
    if data.nbytes < at:
        raise LayoutError(f"tensor {spec.name!r} has {data.nbytes} encoded bytes, its header {at}")
    per_byte = DIGITS_PER_BYTE[base]
    sizes = struct.unpack_from(f"<{count + 1}I", data, _HEADER.size) if count else (0,)
    sizes = (-(-spec.size // per_byte) if per_byte else 0, *sizes)
    if at + sum(sizes) != data.nbytes:
        raise LayoutError(f"tensor {spec.name!r} has {data.nbytes} encoded bytes, its parts {at + sum(sizes)}")
    content = np.frombuffer(data, np.uint8)
    digits, *levels, counts = (content[start:stop] for start, stop in pairwise(accumulate(sizes, initial=at)))
    _check_members([*levels, counts], spec)
    return _Parts(np.float32(step), base, digits, levels, counts)


def _check_members(streams: list[Array], spec: TensorSpec) -> None:
    """Raise CorruptError unless no level has more members than the one before, and the last has as many counts.

    Checked before any memory is taken for marks.
    """
    members = [spec.size, *map(ends_in, streams)]
    if len(streams) > 1 and members[-1] != members[-2]:
        raise CorruptError(f"tensor {spec.name!r} has {members[-1]} counts for {members[-2]} members")
    if any(more > fewer for fewer, more in pairwise(members)):
        raise CorruptError(f"tensor {spec.name!r} marks more elements than there are")

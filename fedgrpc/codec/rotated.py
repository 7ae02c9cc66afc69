"""Few bits after a random rotation: DRIVE (arXiv 2105.08339) at one bit, EDEN (arXiv 2108.08842) at 1 to 4.

    z = R x,  R = H D   (H orthonormal Walsh-Hadamard, D random signs)
    q = nearest Lloyd-Max centroid of the standard normal to z sqrt(n) / |x|
    S = |x|^2 / <z, q>,     decoded = R^-1 (S q)

After the rotation every coordinate is close to normal, whatever x was; with this scale S the estimate is
unbiased over the rotations.

    bytes: seed of the signs uint64, the scales S of all blocks (float32), then all codes, packed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.packing import pack, packed_size, unpack
from fedgrpc.codec.values import PIECE, as_float32, flat, require_float, require_size
from fedgrpc.errors import CorruptError, EncodeError, UsageError

# Upper halves of the Lloyd-Max centroids of the standard normal; the lower halves are their negatives.
_UPPER = {
    1: (0.7978846,),
    2: (0.45278, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.128395, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
_SMALLEST_BLOCK = 16
_CELLS_PER_UNIT, _CELLS = 256, 2048


def centroids(bits: int) -> Array:
    """Return all 2**bits centroids in increasing order, float32."""
    upper = np.array(_UPPER[bits], np.float32)
    return np.concatenate([-upper[::-1], upper])


@dataclass(frozen=True)
class Rotated(TextForm):
    """Unbiased 1 to 4 bit quantization in rotated blocks (arXiv 2105.08339, 2108.08842).

    Relative squared error about 0.57, 0.13, 0.036, 0.0096 at 1 to 4 bits, for any distribution of values (up to a
    third more where a few values hold nearly all of a block's energy).
    """

    name: ClassVar[str] = "rotated"
    lossless: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    bits: int = 2
    block: int = 4096

    def __post_init__(self) -> None:
        if self.bits not in _UPPER:
            raise UsageError(f"rotated quantization to {self.bits} bits; allowed: 1 to 4")
        if not _SMALLEST_BLOCK <= self.block <= 65536 or self.block & (self.block - 1):
            raise UsageError(f"block={self.block}; allowed: a power of two from {_SMALLEST_BLOCK} to 65536")

    @property
    def name_and_field(self) -> tuple[str, str]:
        return f"rotated{self.bits}", "bits"

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        seed = rng.integers(0, 2**64, dtype=np.uint64)
        # Only the seed travels. Both sides compute the signs from it.
        signs = random_signs(int(seed), self.block)
        scales, packed = [np.empty(0, np.float32)], [np.empty(0, np.uint8)]
        for start, rows, width in self._groups(values.size):
            # The tail is padded with zeros to a power of two, all of which are coded.
            block = _rows(as_float32(values[start : start + rows * width]), rows, width)
            scale, codes = _quantize(rotate(block * signs[:width]), self.bits)
            scales.append(scale)
            packed.append(pack(codes, self.bits))
        parts = [np.array([seed], "<u8"), np.concatenate(scales).astype("<f4"), np.concatenate(packed)]
        return memoryview(b"".join(part.tobytes() for part in parts))

    @np.errstate(over="ignore", invalid="ignore")
    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        require_size(data, self.size_bounds(spec)[0], spec)
        signs = random_signs(int.from_bytes(data[:8], "little"), self.block)
        count = self._scale_count(spec.size)
        scales = np.frombuffer(data, "<f4", count, 8).astype(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise CorruptError(f"tensor {spec.name!r} has a block scale that is negative or not finite")
        packed, table = (
            np.frombuffer(data, np.uint8, offset=8 + 4 * count),
            centroids(self.bits).astype(np.float64),
        )
        out, first = np.empty(spec.size, spec.numpy_dtype), 0
        for start, rows, width in self._groups(spec.size):
            at, codes = start * self.bits // 8, rows * width
            part = unpack(packed[at : at + packed_size(codes, self.bits)], codes, self.bits)
            block = _turned_back(table.take(part).reshape(rows, width), scales[first : first + rows])
            target = out[start : start + codes]
            target[:] = (block * signs[:width]).reshape(-1)[: target.size]
            first += rows
        return out.reshape(spec.shape)

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        full, tail = divmod(spec.size, self.block)
        codes = full * self.block + (_tail_width(tail) if tail else 0)
        exact = 8 + 4 * self._scale_count(spec.size) + packed_size(codes, self.bits)
        return exact, exact

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """Return the codes, flat, for the order-0 entropy."""
        packed = np.frombuffer(data, np.uint8, offset=8 + 4 * self._scale_count(spec.size))
        return unpack(packed, packed.size * 8 // self.bits, self.bits)

    def _scale_count(self, size: int) -> int:
        return -(-size // self.block)

    def _groups(self, size: int) -> list[tuple[int, int, int]]:
        """Return (first element, blocks, elements of each) of cache-sized groups, then of the padded tail."""
        full = size // self.block
        step = max(1, PIECE // self.block)
        groups = [(i * self.block, min(step, full - i), self.block) for i in range(0, full, step)]
        tail = size - full * self.block
        return [*groups, (full * self.block, 1, _tail_width(tail))] if tail else groups


def random_signs(seed: int, count: int) -> Array:
    """Return `count` signs (float32, 1 or -1) from SplitMix64 (Steele et al. 2014), lowest bit of a word first."""
    # A counter-based generator: every word is computed from its index, so numpy makes all of them at once, and a
    # few lines in any language make the same.
    counters = np.arange(1, -(-count // 64) + 1, dtype=np.uint64)
    words = np.uint64(seed) + counters * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = words ^ (words >> np.uint64(31))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:count]
    return np.float32(1) - np.float32(2) * bits


def _turned_back(rows: Array, scales: Array) -> Array:
    """Return scale * (H row) / sqrt(length) of each row of centroids, as float32: the same bits everywhere.

    Sums of at most 65536 centroids, multiples of 2^-26 below 4, are exact in float64 whatever their order. So
    BLAS, butterflies and another language agree, and only the three operations after the sums round.
    """
    sums = _transformed(rows, _signs_of_hadamard)
    return np.asarray(
        (sums * scales[:, None].astype(np.float64) / np.sqrt(float(rows.shape[1]))).astype(np.float32)
    )


def rotate(rows: Array) -> Array:
    """Return the orthonormal Walsh-Hadamard transform of each row (a power of two long), its own inverse."""
    return _transformed(rows, hadamard)


def _transformed(rows: Array, matrix: Callable[[int], Array]) -> Array:
    """Multiply each row by the Walsh-Hadamard matrix of its length.

    H of order a b is the Kronecker product of those of order a and b. With a row as an a x b matrix X, its
    transform is H_a X H_b: two small matrix products in BLAS, several times faster than butterflies in numpy.
    """
    exponent = rows.shape[1].bit_length() - 1
    left, right = matrix(exponent // 2), matrix(exponent - exponent // 2)
    cube = rows.reshape(-1, left.shape[0], right.shape[0])
    result: Array = left @ (cube @ right)
    return result.reshape(rows.shape)


@lru_cache
def hadamard(exponent: int) -> Array:
    """Return the orthonormal Walsh-Hadamard matrix of order 2**exponent, float32."""
    matrix = np.ones((1, 1))
    for _ in range(exponent):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return matrix.astype(np.float32)


@lru_cache
def _signs_of_hadamard(exponent: int) -> Array:
    """Return the matrix of order 2**exponent without its factor: 1 and -1, float64."""
    return np.sign(hadamard(exponent)).astype(np.float64)


def _tail_width(tail: int) -> int:
    # The transform needs a power of two. A short tail is padded, rather than a whole block coded for it.
    return max(_SMALLEST_BLOCK, 1 << (tail - 1).bit_length())


def _rows(values: Array, rows: int, width: int) -> Array:
    if missing := rows * width - values.size:
        values = np.concatenate([values, np.zeros(missing, np.float32)])
    return values.reshape(rows, width)


def _quantize(rotated: Array, bits: int) -> tuple[Array, Array]:
    """Return the scale of each row, and all codes as uint8."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rotated, rotated)
    if not np.isfinite(squares).all():
        raise EncodeError("a tensor holds NaN, infinity or a value out of range; it cannot be rotated")
    # Below this the squares of single elements are subnormal and lose bits. The block becomes zero.
    squares[squares < np.float32(2.0**-100)] = 0
    root = np.sqrt(squares / np.float32(rotated.shape[1]))
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    # Coordinates in units of their standard deviation, then in cells of the table, with 0 in the middle.
    cells = rotated * (inverse * np.float32(_CELLS_PER_UNIT))[:, None] + np.float32(_CELLS // 2)
    codes = _cell_codes(bits).take(np.clip(cells, 0, _CELLS - 1, out=cells).astype(np.int16))
    # S = |x|^2 / <z, q> makes the estimate unbiased; |z| = |x|, as the rotation keeps lengths.
    projections = np.einsum("ij,ij->i", rotated, centroids(bits).take(codes))
    scales = np.divide(squares, projections, out=np.zeros_like(squares), where=projections > 0)
    return scales, codes.reshape(-1)


@lru_cache
def _cell_codes(bits: int) -> Array:
    """Return the nearest centroid of each cell of width 1/256 around zero: a table instead of a search.

    A cell that spans a boundary rounds some values to the second nearest centroid, at most 1/256 further away.
    """
    middles = (np.arange(_CELLS) + 0.5 - _CELLS // 2) / _CELLS_PER_UNIT
    table = centroids(bits)
    return np.searchsorted((table[1:] + table[:-1]) / 2, middles).astype(np.uint8)

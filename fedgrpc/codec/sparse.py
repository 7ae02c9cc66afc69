"""Sparsification: only the largest elements travel, their positions as marks, their values quantized.

Top-k or threshold sparsification as in Deep Gradient Compression (Lin et al., arXiv 1712.01887). The other
elements are lost unless error feedback (`feedback`) keeps them, so use it with that.

    bytes: count uint32, bytes of marks uint32, marks (see `packing`, without flags), values as `Uniform`
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.packing import MarkReader, ends_in, write_marks
from fedgrpc.codec.rounding import rms
from fedgrpc.codec.uniform import BITS, Uniform
from fedgrpc.codec.values import PIECE, Content, flat, pieces, require_float, require_size
from fedgrpc.errors import CorruptError, LayoutError, UsageError

_HEADER = struct.Struct("<II")


class _Sparse(TextForm):
    """The part of a sparse encoding that does not depend on which elements are kept."""

    lossless: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    name: ClassVar[str]
    bits: int

    def _kept(self, values: Array) -> Array:
        """Return the increasing positions of the kept elements. Raises `EncodeError` for non-finite ones."""
        raise NotImplementedError

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        return _write(values, self._kept(values), self.bits, rng)

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        return _read(data, spec, self.bits)

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        return _HEADER.size, max(_HEADER.size, spec.nbytes)

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """Return the codes, flat, for the order-0 entropy; one more code stands for elements left out."""
        return _symbols(data, spec, self.bits)


@dataclass(frozen=True)
class TopK(_Sparse):
    """The largest `fraction` of the elements by magnitude (at least one), exactly; ties by position."""

    name: ClassVar[str] = "topk"
    fraction: float = 0.01
    bits: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"fraction={self.fraction}; allowed: above 0 up to 1")
        _check_bits(self.bits)

    def _kept(self, values: Array) -> Array:
        rms(values)  # refuses values that are not finite
        return _largest(np.abs(values), self.fraction)


@dataclass(frozen=True)
class Threshold(_Sparse):
    """The elements of at least `times` the tensor's RMS. Their number follows from the distribution."""

    name: ClassVar[str] = "threshold"
    times: float = 3.0
    bits: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.times <= 1000:
            raise UsageError(f"times={self.times}; allowed: above 0 up to 1000 times the RMS")
        _check_bits(self.bits)

    def _kept(self, values: Array) -> Array:
        bound = max(self.times * rms(values), np.finfo(np.float32).tiny)
        return np.flatnonzero(np.abs(values) >= bound)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise UsageError(f"values of {bits} bits; allowed: {BITS}")


def _largest(magnitudes: Array, fraction: float) -> Array:
    """Return the increasing positions of the k largest magnitudes."""
    if not magnitudes.size:
        return np.empty(0, np.int64)
    k = max(1, round(fraction * magnitudes.size))
    kth = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    kept = np.flatnonzero(magnitudes > kth)
    ties = np.flatnonzero(magnitudes == kth)[: k - kept.size]
    return np.sort(np.concatenate([kept, ties]))


def _write(values: Array, positions: Array, bits: int, rng: np.random.Generator) -> memoryview:
    marks = write_marks(positions)
    kept = Uniform(bits, rounding="nearest").encode(values[positions], rng)
    return memoryview(b"".join((_HEADER.pack(positions.size, marks.size), marks.tobytes(), kept)))


@np.errstate(over="ignore")
def _read(data: memoryview, spec: TensorSpec, bits: int) -> Array:
    kept_spec, positions, content = _split(data, spec, bits)
    out = np.zeros(spec.size, spec.numpy_dtype)
    fill = Uniform(bits, rounding="nearest").fill_from(content, kept_spec)
    values = np.empty(min(kept_spec.size, PIECE), np.float32)
    for piece, places in positions:
        part = values[: places.size]
        fill(part, piece.start)
        out[places] = part
    return out.reshape(spec.shape)


def _symbols(data: memoryview, spec: TensorSpec, bits: int) -> Array:
    kept_spec, positions, content = _split(data, spec, bits)
    symbols = Uniform(bits, rounding="nearest").symbols(content(0, data.nbytes), kept_spec)
    out = np.full(spec.size, 1 << bits, np.int32)
    for piece, places in positions:
        out[places] = symbols[piece]
    return out


def _split(
    data: memoryview, spec: TensorSpec, bits: int
) -> tuple[TensorSpec, Iterator[tuple[slice, Array]], Content]:
    """Return the spec of the kept values, their numbers and positions piece by piece, and their encoded bytes.

    Raises LayoutError or CorruptError. So does the iterator of positions.
    """
    if data.nbytes < _HEADER.size:
        raise LayoutError(f"tensor {spec.name!r} has {data.nbytes} encoded bytes, its header {_HEADER.size}")
    count, size_of_marks = _HEADER.unpack_from(data)
    if count > spec.size:
        raise CorruptError(f"tensor {spec.name!r} has {count} values for {spec.size} elements")
    kept_spec = TensorSpec(spec.name, "float32", (count,))
    end = _HEADER.size + size_of_marks
    require_size(data, end + Uniform(bits).size_bounds(kept_spec)[0], spec)
    # Count the marks before any memory is taken for them.
    stream = np.frombuffer(data[_HEADER.size : end], np.uint8)
    if ends_in(stream) != count:
        raise CorruptError(f"tensor {spec.name!r} has not {count} positions for as many values")
    marks = MarkReader(stream)
    return kept_spec, _positions(marks, count, spec), lambda start, size: data[end + start : end + start + size]


def _positions(marks: MarkReader, count: int, spec: TensorSpec) -> Iterator[tuple[slice, Array]]:
    for piece in pieces(count):
        places = marks.take(piece.stop - piece.start)
        if places[-1] >= spec.size:
            raise CorruptError(f"tensor {spec.name!r} has a value at {places[-1]} of {spec.size}")
        yield piece, places
    marks.finish()

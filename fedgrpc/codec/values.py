"""Values of tensors: flat pieces that fit the cache, parts on demand, differences.

Whole-array numpy runs at memory speed, pieces of 64 KiB at cache speed: about 2.5 times faster here.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fedgrpc.codec.layout import Array, TensorRole, TensorSpec
from fedgrpc.errors import EncodeError, LayoutError

PIECE = 16384
_LITTLE = "<|=" if sys.byteorder == "little" else "<|"

# content(start, size): bytes of an encoded tensor.
Content = Callable[[int, int], memoryview]
# fill(out, first): elements of a tensor from number `first` on, as many as fit. `first` is a multiple of `PIECE`.
Fill = Callable[[Array, int], None]
# part(start, stop): these elements of a tensor, flat, not to be changed, and valid until the next call.
Part = Callable[[int, int], Array]
# arrives(start, values, decoded): the elements from `start` as they will be decoded; `decoded` may be overwritten.
Arrives = Callable[[int, Array, Array], None]


def flat(array: Array) -> Array:
    """Return the array one-dimensional, contiguous and little-endian: a view of it wherever possible."""
    contiguous = np.ascontiguousarray(array).reshape(-1)
    if contiguous.dtype.byteorder in _LITTLE:
        return contiguous
    return contiguous.astype(contiguous.dtype.newbyteorder("<"), copy=False)


def pieces(size: int, step: int = PIECE) -> Iterator[slice]:
    """Yield slices of at most `step` elements that cover `size` elements in order."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def as_float32(piece: Array) -> Array:
    """Return the piece as float32, itself if it is that already. A value that overflows becomes infinite."""
    if piece.dtype == np.float32:
        return piece
    with np.errstate(over="ignore"):
        return piece.astype(np.float32)


def refuse_non_finite(values: Array) -> None:
    """Raise EncodeError if any value of a float array is NaN or infinite; other dtypes always pass."""
    if values.dtype.kind != "f" and values.dtype != ml_dtypes.bfloat16:
        return
    flat_values = values.reshape(-1)
    for piece in pieces(flat_values.size, PIECE):
        if not _all_finite(flat_values[piece]):
            raise EncodeError("a tensor holds NaN, infinity or a value out of range; it cannot be encoded")


def _all_finite(piece: Array) -> bool:
    if piece.dtype.itemsize > 2:
        return bool(np.logical_and.reduce(np.isfinite(piece)))
    # numpy's own test of two-byte floats is ten times slower than this one of their exponents.
    exponent = np.uint16(0x7C00 if piece.dtype.kind == "f" else 0x7F80)
    return bool((piece.view("<u2") & exponent).max(initial=0) < exponent)


@np.errstate(over="ignore", invalid="ignore")
def filled(fill: Fill, spec: TensorSpec, step: int = PIECE) -> Array:
    """Return a whole tensor from `fill`, which gives float32 elements, `step` at a time, in the dtype of the spec.

    Takes no memory beyond the tensor and one piece. Overflow gives infinity, which admission then refuses.
    """
    out = np.empty(spec.size, spec.numpy_dtype)
    scratch = np.empty(0 if spec.dtype == "float32" else min(spec.size, step), np.float32)
    for piece in pieces(spec.size, step):
        part = scratch[: piece.stop - piece.start] if scratch.size else out[piece]
        fill(part, piece.start)
        if scratch.size:
            out[piece] = part
    return out.reshape(spec.shape)


def require_size(data: memoryview, wanted_bytes: int, spec: TensorSpec) -> None:
    """Raise LayoutError unless the encoded tensor has exactly the wanted number of bytes."""
    if data.nbytes != wanted_bytes:
        raise LayoutError(f"tensor {spec.name!r} has {data.nbytes} encoded bytes, expected {wanted_bytes}")


def require_float(spec: TensorSpec, encoding: object) -> None:
    """Raise LayoutError when a lossy encoding is declared for a tensor that is not trained floats."""
    if not spec.is_trained:
        what = spec.dtype if not spec.is_float else f"a {spec.role}"
        raise LayoutError(f"tensor {spec.name!r} is {what} and cannot be encoded as {encoding}")


class InParts(Mapping[str, Array]):
    """Tensors by name, available a part at a time, so that code working in cache-sized pieces holds none whole."""

    @abstractmethod
    def part_of(self, name: str) -> Part | None:
        """Return access to parts of that tensor; None where it is only available whole."""


def part_filled(fill: Fill, dtype: np.dtype[Any] | type[np.generic]) -> Part:
    """Return the part of a tensor that `fill` gives, in one buffer that grows to the largest part asked for."""
    buffer = np.empty(0, dtype)

    def part(start: int, stop: int) -> Array:
        nonlocal buffer
        if buffer.size < stop - start:
            buffer = np.empty(stop - start, dtype)
        fill(buffer[: stop - start], start)
        return buffer[: stop - start]

    return part


def part_of(tensors: Mapping[str, Array], name: str) -> Part:
    """Return access to parts of that tensor; one that is only available whole is read first."""
    part = tensors.part_of(name) if isinstance(tensors, InParts) else None
    if part is not None:
        return part
    values = flat(tensors[name])
    return lambda start, stop: values[start:stop]


def subtract(spec: TensorSpec, new: Array, old: Array) -> Array:
    """Return what travels of `new` to a side that has `old`: new - old of trained floats, else `new` itself.

    Statistics, counters and masks travel as values, since each has a domain. A mean of variances is no less than
    the least of them, but a sum of rounded differences may be. One of bool or unsigned values has no sign.
    """
    if not spec.is_trained:
        return new
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.subtract(new, old, dtype=new.dtype))


def add(spec: TensorSpec, old: Array, change: Array) -> Array:
    """Return `old` with what travelled, up to one rounding: the same bits wherever it is computed."""
    if not spec.is_trained:
        return change
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.add(old, change, dtype=old.dtype))


def left_out(spec: TensorSpec, new: Array, old: Array) -> bool:
    """Return whether a difference or an update leaves the tensor out: no parameter, and unchanged."""
    return spec.role is not TensorRole.PARAMETER and np.array_equal(
        flat(new).view(np.uint8), flat(old).view(np.uint8)
    )

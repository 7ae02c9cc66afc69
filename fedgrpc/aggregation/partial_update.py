"""Partial updates: how the tensors of an update that covers a sub-model travel. Layout, packing and unpacking.

A tensor of the update is one of these, `n` the elements that the sub-model has of the model's tensor:

    NAME            these elements, dense
    NAME, NAME#mask      [k] values that are kept, and n bits that say where, 8 to a byte, first bit lowest
    NAME, NAME#codes     [K] different values, and for each element kept its number, in the fewest bits

With a mask and codes, there are codes of the kept elements only. Personal tensors and those that are not
trained are left out, and so are unchanged tensors that are not parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from fedgrpc.aggregation.admission import TensorLike, check_role
from fedgrpc.errors import UpdateRefused
from fedgrpc.submodels.channels import KeptChannels
from fedgrpc.submodels.coverage import Coverage

MASK, CODES = "#mask", "#codes"
_MAX_VALUES = 256
_PIECE = 1 << 16

Read = Callable[[str], np.ndarray]


def code_bits(count: int) -> int:
    """Return the bits of the numbers below `count`, at least 1."""
    return max(1, (count - 1).bit_length())


def pack(
    name: str, values: np.ndarray, mask: np.ndarray | None = None, clustered: bool = False
) -> dict[str, np.ndarray]:
    """Return the tensors that travel for a sub-model's dense `values` of one tensor.

    A clustered tensor of too many different values travels dense.
    """
    packed: dict[str, np.ndarray] = {}
    if mask is not None:
        packed[name + MASK] = np.packbits(mask.reshape(-1), bitorder="little")
        values = values[mask]
    if clustered:
        different, codes = np.unique(values.reshape(-1), return_inverse=True)
        if 0 < len(different) <= _MAX_VALUES:
            packed[name + CODES] = _pack_codes(codes.reshape(-1).astype(np.uint8), code_bits(len(different)))
            values = different
    return {name: values, **packed}


def check_layout(
    model: Sequence[TensorLike],
    update: Sequence[TensorLike],
    kept: KeptChannels | None = None,
    masked: bool = False,
    clustered: bool = False,
    kept_back: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise `UpdateRefused` unless the update lists each tensor of its sub-model once, in a form its plan allows.

    The error names the first difference.
    """
    given = {tensor.name: tensor for tensor in update}
    if len(given) < len(update):
        raise UpdateRefused("the update lists a tensor twice")
    for tensor in model:
        if kept_back(tensor.name) or not (kept is None or kept.has(tensor.name)):
            continue
        # Whatever is left in `given` at the end is not of this sub-model.
        mine = given.pop(tensor.name, None)
        if mine is None and tensor.role != "parameter":
            continue
        if mine is None:
            raise UpdateRefused(f"tensor {tensor.name!r} is missing")
        shape = _sub_shape(tensor, kept)
        mask = given.pop(tensor.name + MASK, None) if masked else None
        codes = given.pop(tensor.name + CODES, None) if clustered else None
        if mine.dtype != tensor.dtype or not fits(mine.shape, shape, mask, codes):
            whose = "the model's is" if kept is None else "this worker's sub-model has"
            raise UpdateRefused(
                f"tensor {tensor.name!r} is {mine.dtype}{list(mine.shape)}, {whose} {tensor.dtype}{list(shape)}"
            )
        check_role(tensor, mine)
    if given:
        raise UpdateRefused(f"the update's sub-model has no tensor {min(given)!r}")


def _sub_shape(tensor: TensorLike, kept: KeptChannels | None) -> tuple[int, ...]:
    return tensor.shape if kept is None else kept.coverage(tensor.name, tensor.shape).sub_shape


def fits(
    given: tuple[int, ...], shape: tuple[int, ...], mask: TensorLike | None, codes: TensorLike | None
) -> bool:
    """Return whether shapes and dtypes can be those of one packed tensor. Only `unpack` can tell for certain."""
    size = math.prod(shape)
    if mask is None and codes is None:
        return given == shape
    fit = len(given) == 1
    if mask is not None:
        fit &= mask.dtype == "uint8" and mask.shape == ((size + 7) // 8,)
    if codes is None:
        return fit and given[0] <= size
    # A mask hides how many codes there are, so their bytes are only bounded.
    most = (size * code_bits(given[0]) + 7) // 8 if fit else 0
    fit &= codes.dtype == "uint8" and len(codes.shape) == 1 and 0 < given[0] <= _MAX_VALUES
    return fit and (codes.shape[0] <= most if mask is not None else codes.shape[0] == most)


def unpack(name: str, names: Collection[str], read: Read, whole: Coverage) -> tuple[np.ndarray, Coverage]:
    """Return the values of a packed tensor and their coverage; `whole` is the sub-model's coverage.

    `names` are those of the update's tensors, and `read` returns one of them. Raises `UpdateRefused` when they do
    not fit each other.
    """
    values, coverage = read(name), whole
    if name + MASK in names:
        size = math.prod(whole.sub_shape)
        mask = np.unpackbits(read(name + MASK), count=size, bitorder="little").view(np.bool_)
        coverage = whole.masked(mask.reshape(whole.sub_shape))
    if name + CODES in names:
        count = math.prod(coverage.value_shape)
        values = _scattered(name, values, read(name + CODES), count).reshape(coverage.value_shape)
    if values.shape != coverage.value_shape:
        raise UpdateRefused(f"tensor {name!r} has {values.size} values, its mask keeps {coverage.value_shape[0]}")
    return values, coverage


def unpack_all(
    model: Sequence[TensorLike], names: Collection[str], read: Read, kept: KeptChannels | None
) -> Iterator[tuple[TensorLike, np.ndarray]]:
    """Yield each tensor of the update with its unpacked values, one at a time. Raises as `unpack` does."""
    for tensor in model:
        if tensor.name in names:
            yield tensor, unpack(tensor.name, names, read, coverage_of(tensor, kept))[0]


def coverage_of(tensor: TensorLike, kept: KeptChannels | None) -> Coverage:
    """Return what a sub-model covers of a tensor that it has; None is the whole model."""
    return Coverage(tensor.shape) if kept is None else kept.coverage(tensor.name, tensor.shape)


def sub_layout(model: Sequence[TensorLike], kept: KeptChannels | None) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a sub-model, by name."""
    has = [tensor for tensor in model if kept is None or kept.has(tensor.name)]
    return {tensor.name: _sub_shape(tensor, kept) for tensor in has}


def _scattered(name: str, values: np.ndarray, packed: np.ndarray, count: int) -> np.ndarray:
    bits = code_bits(values.size)
    if packed.size != (count * bits + 7) // 8:
        raise UpdateRefused(f"tensor {name!r} has {packed.size} bytes of codes for {count} elements")
    codes = _unpack_codes(packed, count, bits)
    if codes.max(initial=0) >= values.size:
        raise UpdateRefused(f"tensor {name!r} has a code beyond its {values.size} values")
    scattered = np.empty(count, values.dtype)
    for start in range(0, count, _PIECE):
        # In pieces, since numpy makes eight bytes of each code to index with.
        scattered[start : start + _PIECE] = values[codes[start : start + _PIECE]]
    return scattered


def _pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes: bit j of code i is bit i * bits + j of the stream, whose bit k is bit k % 8 of byte k // 8."""
    parts = [
        np.packbits(_bits_of(codes[start : start + _PIECE], bits), bitorder="little")
        for start in range(0, codes.size, _PIECE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _bits_of(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes[:, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)


def _unpack_codes(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    codes = np.empty(count, np.uint8)
    weights = (np.uint8(1) << np.arange(bits, dtype=np.uint8)).astype(np.uint8)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        first = start * bits // 8
        part = np.unpackbits(packed[first : first + (size * bits + 7) // 8], count=size * bits, bitorder="little")
        codes[start : start + size] = part.reshape(size, bits) @ weights
    return codes

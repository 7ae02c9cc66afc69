"""What training changed, tensor by tensor, in each tensor's own dtype.

    float                trained - given
    integers and bool    trained, the value itself: counters such as BatchNorm's `num_batches_tracked`, masks

A mean of counters is a mean of their values, and a difference of bool or unsigned values would have no sign.
`apply_delta` undoes it, so given + delta gives trained (for floats up to one rounding).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec, spec_of
from fedgrpc.errors import LayoutError


class Delta(Mapping[str, Array]):
    """What travels, computed when a tensor is asked for, so that no third model is held in memory."""

    def __init__(self, trained: Mapping[str, Array], given: Mapping[str, Array]) -> None:
        """Raises LayoutError unless both have the same tensors; floats may differ in width."""
        if missing := given.keys() - trained.keys():
            raise LayoutError(f"training returned no tensor {min(missing)!r}")
        if surplus := trained.keys() - given.keys():
            raise LayoutError(f"training returned the tensor {min(surplus)!r}, which the model does not have")
        self._given = given
        self._trained = {name: _like(name, trained[name], array) for name, array in given.items()}

    def __getitem__(self, name: str) -> Array:
        return _subtract(self._trained[name], self._given[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def apply_delta(base: Mapping[str, Array], delta: Iterable[tuple[TensorSpec, Array]]) -> dict[str, Array]:
    """base + delta as new arrays; raises LayoutError unless the delta has the tensors of the base."""
    applied: dict[str, Array] = {}
    for spec, change in delta:
        if spec.name not in base or spec_of(spec.name, base[spec.name]) != spec:
            raise LayoutError(f"the difference has a tensor {spec.name!r} that does not fit the held model")
        applied[spec.name] = _add(base[spec.name], change)
    if applied.keys() != base.keys():
        raise LayoutError(f"the difference lacks {len(base) - len(applied)} tensors of the held model")
    return applied


def _like(name: str, array: Array, given: Array) -> Array:
    """`array` in the dtype of `given`: NumPy code returns float64 easily. Anything else must fit."""
    array = np.asarray(array)
    if array.shape != given.shape:
        raise LayoutError(f"training returned {name!r} with shape {array.shape}, the model's is {given.shape}")
    if array.dtype == given.dtype:
        return array
    if not (spec_of(name, array).is_float and spec_of(name, given).is_float):
        raise LayoutError(f"training returned {name!r} as {array.dtype}, the model's is {given.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(given.dtype)


def _subtract(left: Array, right: Array) -> Array:
    if not _is_float(left):
        return left
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.subtract(left, right, dtype=left.dtype))


def _add(left: Array, right: Array) -> Array:
    if not _is_float(left):
        return right
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.add(left, right, dtype=left.dtype))


def _is_float(array: Array) -> bool:
    return array.dtype.kind not in "iub"

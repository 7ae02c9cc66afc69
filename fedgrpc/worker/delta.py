"""What training changed, tensor by tensor (`fedgrpc.codec.difference`). `Applied` undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedgrpc.codec.difference import add, subtract
from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.payload import PayloadReader
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
        return subtract(self._trained[name], self._given[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


class Applied(Mapping[str, Array]):
    """base + delta, each tensor read and computed when it is asked for."""

    def __init__(self, base: PayloadReader, delta: PayloadReader) -> None:
        """Raises LayoutError unless the delta has the tensors of the base."""
        specs = {spec.name: spec for spec in base.manifest.layout}
        self._names = [spec.name for spec in delta.manifest.layout]
        for spec in delta.manifest.layout:
            if specs.get(spec.name) != spec:
                raise LayoutError(f"the difference has a tensor {spec.name!r} that does not fit the held model")
        if len(self._names) != len(specs):
            lacking = len(specs) - len(self._names)
            raise LayoutError(f"the difference lacks {lacking} tensors of the held model")
        self._base = base
        self._delta = delta

    def __getitem__(self, name: str) -> Array:
        return add(self._base.tensor(name), self._delta.tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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

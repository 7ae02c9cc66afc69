"""What training changed, tensor by tensor (`fedgrpc.codec.difference`). `Applied` undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedgrpc.codec.difference import add, subtract
from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.parts import InParts
from fedgrpc.codec.payload import PayloadReader
from fedgrpc.codec.values import Part, flat
from fedgrpc.errors import LayoutError


class Delta(InParts):
    """What travels, computed when it is asked for, so that no third model is held in memory."""

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

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        if self._given[name].dtype != np.float32:
            return None
        trained, given, out = flat(self._trained[name]), flat(self._given[name]), np.empty(0, np.float32)

        @np.errstate(over="ignore", invalid="ignore")
        def part(start: int, stop: int) -> Array:
            nonlocal out
            if out.size < stop - start:
                out = np.empty(stop - start, np.float32)
            return np.subtract(trained[start:stop], given[start:stop], out=out[: stop - start])

        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


class Applied(InParts):
    """base + delta, read and computed when it is asked for."""

    def __init__(self, base: PayloadReader, delta: PayloadReader) -> None:
        """Raises LayoutError unless the delta has the tensors of the base."""
        specs = {spec.name: spec for spec in base.manifest.layout}
        self.layout = delta.manifest.layout
        for spec in self.layout:
            if specs.get(spec.name) != spec:
                raise LayoutError(f"the difference has a tensor {spec.name!r} that does not fit the held model")
        if len(self.layout) != len(specs):
            lacking = len(specs) - len(self.layout)
            raise LayoutError(f"the difference lacks {lacking} tensors of the held model")
        self._base = base
        self._delta = delta

    def __getitem__(self, name: str) -> Array:
        return add(self._base.tensor(name), self._delta.tensor(name))

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        base, delta = self._base.part_of(name), self._delta.part_of(name)
        if base is None or delta is None:
            return None
        return lambda start, stop: add(base(start, stop), delta(start, stop))

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self.layout)

    def __len__(self) -> int:
        return len(self.layout)


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

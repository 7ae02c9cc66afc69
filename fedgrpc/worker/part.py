"""The tensors of a partial update, as they travel (`fedgrpc.aggregation.partial_update`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from fedgrpc.aggregation.partial_update import pack
from fedgrpc.codec.layout import Array
from fedgrpc.codec.values import InParts, Part, part_of


class Covered(InParts):
    """A delta without its personal tensors, of pruned ones the kept values, of clustered ones the codes."""

    def __init__(
        self,
        delta: Mapping[str, Array],
        masks: Mapping[str, np.ndarray],
        clustered: Collection[str],
        is_personal: Callable[[str], bool],
    ) -> None:
        self._delta = delta
        self._names: list[str] = []
        self._packed: dict[str, Array] = {}
        for name in delta:
            if is_personal(name):
                continue
            packed = {}
            if name in masks or name in clustered:
                packed = pack(name, delta[name], masks.get(name), name in clustered)
            self._packed |= packed
            self._names += packed or [name]

    def __getitem__(self, name: str) -> Array:
        return self._packed[name] if name in self._packed else self._delta[name]

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        return None if name in self._packed else part_of(self._delta, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

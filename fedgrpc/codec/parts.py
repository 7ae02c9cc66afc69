"""Tensors by name that can be had a part at a time, so that what works in cache-sized pieces holds none whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from fedgrpc.codec.layout import Array
from fedgrpc.codec.values import Part, flat


class InParts(Mapping[str, Array]):
    """A mapping that computes or reads what it is asked for, and no more."""

    @abstractmethod
    def part_of(self, name: str) -> Part | None:
        """What gives elements of that tensor; None where it is only to be had whole."""


def part_of(tensors: Mapping[str, Array], name: str) -> Part:
    """What gives elements of that tensor, in whatever way it is to be had."""
    part = tensors.part_of(name) if isinstance(tensors, InParts) else None
    if part is not None:
        return part
    values = flat(tensors[name])
    return lambda start, stop: values[start:stop]

"""Differences between two model files, tensor by tensor, read in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedgrpc.storage.model_file import ModelFile

_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class TensorDifference:
    """Change of one tensor: L2 norms of it before and of the change, and the largest change of an element.

    `note` says what else is wrong: it is only in one file, or has another shape.
    """

    name: str
    shape: tuple[int, ...]
    norm: float = 0.0
    change: float = 0.0
    largest: float = 0.0
    note: str = ""


def differences(before: ModelFile, after: ModelFile) -> Iterator[TensorDifference]:
    """Yield the change of each tensor, those of `before` first. Raises `StorageError`."""
    places = {spec.name: index for index, spec in enumerate(after.layout)}
    for index, spec in enumerate(before.layout):
        other = places.pop(spec.name, None)
        if other is None:
            yield TensorDifference(spec.name, spec.shape, note="only before")
        elif (after.layout[other].shape, after.layout[other].dtype) != (spec.shape, spec.dtype):
            yield TensorDifference(
                spec.name, spec.shape, note=f"{after.layout[other].dtype} of another shape after"
            )
        else:
            yield _difference(before, index, after, other)
    for name, other in places.items():
        yield TensorDifference(name, after.layout[other].shape, note="only after")


def _difference(before: ModelFile, index: int, after: ModelFile, other: int) -> TensorDifference:
    spec, norm, change, largest = before.layout[index], 0.0, 0.0, 0.0
    for start in range(0, spec.size, _PIECE):
        stop = min(start + _PIECE, spec.size)
        # float64: integers of 64 bits lose their last bits, and nothing overflows.
        old = _as_float(before.part(index, start, stop), spec.dtype)
        moved = _as_float(after.part(other, start, stop), spec.dtype) - old
        norm += float(old @ old)
        change += float(moved @ moved)
        largest = max(largest, float(np.abs(moved).max(initial=0.0)))
    return TensorDifference(spec.name, spec.shape, math.sqrt(norm), math.sqrt(change), largest)


def _as_float(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16" and values.dtype.kind != "f":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)

"""Coverage: the coordinates of a tensor that a sub-model has, or that an update changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Index = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Coverage:
    """A sub-tensor of a tensor of `shape`, and the elements that are kept within it.

    `positions` has increasing positions (int64) for each axis, or None for the whole axis. `mask` (bool, of
    `sub_shape`) keeps some of the sub-tensor's elements; None keeps all.
    """

    shape: tuple[int, ...]
    positions: tuple[np.ndarray | None, ...] = ()
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for positions that are not increasing or not within their axis, or a misfit mask."""
        if not self.positions:
            object.__setattr__(self, "positions", (None,) * len(self.shape))
        if len(self.positions) != len(self.shape):
            raise ValueError(f"{len(self.positions)} axes are covered of {len(self.shape)}")
        for extent, taken in zip(self.shape, self.positions, strict=True):
            if taken is not None and not _increasing_within(taken, extent):
                raise ValueError(f"an axis of {extent} has no such increasing positions")
        if self.mask is not None and (self.mask.shape != self.sub_shape or self.mask.dtype != np.bool_):
            raise ValueError(f"a mask is bool{list(self.sub_shape)}, not {self.mask.dtype}{list(self.mask.shape)}")

    @property
    def sub_shape(self) -> tuple[int, ...]:
        """Shape of the sub-tensor, before the mask."""
        pairs = zip(self.shape, self.positions, strict=True)
        return tuple(extent if taken is None else len(taken) for extent, taken in pairs)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of an update's values: that of the sub-tensor or, with a mask, [kept elements] in C order."""
        return self.sub_shape if self.mask is None else (int(np.count_nonzero(self.mask)),)

    @property
    def whole(self) -> bool:
        """True if every coordinate is covered, judged by the absence of positions and mask."""
        return self.mask is None and all(taken is None for taken in self.positions)

    @property
    def index(self) -> Index:
        """Index of the sub-tensor, made of slices alone if all positions follow each other: a view, no copy."""
        plain = [_slice_of(taken) for taken in self.positions]
        if all(each is not None for each in plain):
            return (*plain, ...)  # the dots make an array even of a scalar
        pairs = zip(self.shape, self.positions, strict=True)
        return np.ix_(*(np.arange(extent) if taken is None else taken for extent, taken in pairs))

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Return the covered values of `tensor`, of `value_shape`; a view where possible."""
        if self.whole:
            return tensor
        sub: np.ndarray = tensor[self.index]
        return sub if self.mask is None else sub[self.mask]

    def add_to(self, total: np.ndarray, values: np.ndarray | float) -> None:
        """Add values of `value_shape`, or one number, to the coordinates of `total` that are covered."""
        if self.mask is None:
            total[self.index] += values
        else:
            sub = total[self.index]
            sub[self.mask] += values
            total[self.index] = sub

    def masked(self, mask: np.ndarray) -> Coverage:
        """Return the coverage of this sub-tensor in which `mask` keeps some elements."""
        return Coverage(self.shape, self.positions, mask)


def _increasing_within(positions: np.ndarray, extent: int) -> bool:
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or not positions.size:
        return False
    return bool(positions[0] >= 0 and positions[-1] < extent and (np.diff(positions) > 0).all())


def _slice_of(positions: np.ndarray | None) -> slice | None:
    if positions is None:
        return slice(None)
    start, stop = int(positions[0]), int(positions[-1]) + 1
    return slice(start, stop) if stop - start == len(positions) else None

"""Which coordinates of a tensor an update covers, and the mean of each coordinate over those who trained it.

    mean[c] = sum_{k covers c} p_k * x_k[c] / sum_{k covers c} p_k        (HeteroFL, arXiv 2010.01264)

The rule: a coordinate that nobody covered has no mean, and keeps its value. Where all updates cover everything,
this is `TensorMean` bit for bit. Memory is that of the tensor in hand: its sum, and its weights once they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgrpc.aggregation.mean import TensorMean

Index = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Coverage:
    """A sub-tensor of a tensor of `shape`, and what is kept within it.

    `positions` has for each axis increasing positions (int64), or None for the whole axis. `mask` (bool, of
    `sub_shape`) keeps some of its elements; None keeps all.
    """

    shape: tuple[int, ...]
    positions: tuple[np.ndarray | None, ...] = ()
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for positions that are not increasing positions of their axis, or a misfit mask."""
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
        """Shape of an update's values: of the sub-tensor or, with a mask, [elements kept] in C order."""
        return self.sub_shape if self.mask is None else (int(np.count_nonzero(self.mask)),)

    @property
    def whole(self) -> bool:
        """Whether every coordinate is covered, as a matter of form."""
        return self.mask is None and all(taken is None for taken in self.positions)

    @property
    def index(self) -> Index:
        """What indexes the sub-tensor; of slices alone wherever positions follow each other."""
        plain = [_slice_of(taken) for taken in self.positions]
        if all(each is not None for each in plain):
            return (*plain, ...)  # the dots make an array of a scalar, too
        pairs = zip(self.shape, self.positions, strict=True)
        return np.ix_(*(np.arange(extent) if taken is None else taken for extent, taken in pairs))

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """The values of `tensor` that are covered, of `value_shape`; a view where that is possible."""
        if self.whole:
            return tensor
        sub: np.ndarray = tensor[self.index]
        return sub if self.mask is None else sub[self.mask]

    def masked(self, mask: np.ndarray) -> Coverage:
        """This sub-tensor, of which `mask` keeps some elements."""
        return Coverage(self.shape, self.positions, mask)


class CoordinateMean(TensorMean):
    """Running weighted mean of sub-tensors of a tensor of one `shape`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self._weights: np.ndarray | None = None

    def add(
        self, values: np.ndarray, weight: float, coverage: Coverage | None = None, *, scale: float = 1.0
    ) -> None:
        """Add `scale * values` with `weight`; `values` has the coverage's `value_shape`, None covers all."""
        if coverage is None or coverage.whole:
            super().add(values, weight, scale=scale)
            if self._weights is not None:
                self._weights += weight
            return
        self.add_each(values, weight, coverage, scale=scale)

    def add_each(
        self, values: np.ndarray, weight: np.ndarray | float, coverage: Coverage, *, scale: float = 1.0
    ) -> None:
        """The same where each value may have a weight of its own: an array that goes with `values`."""
        if coverage.shape != self._shape or values.shape != coverage.value_shape:
            raise ValueError(f"shape {values.shape} is not {coverage.value_shape} of {self._shape}")
        if self._weights is None:
            self._weights = np.full(self._shape, self._weight)
        where = coverage.index
        weighted = np.multiply(values, weight * scale, dtype=np.float64)
        _add_at(self._sum.reshape(self._shape), where, coverage.mask, weighted)
        _add_at(self._weights, where, coverage.mask, weight)

    def add_mean(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Add what is itself a mean, in which each coordinate has its own of `weights` (float64, from 0)."""
        if values.shape != self._shape or weights.shape != self._shape:
            raise ValueError(f"shapes {values.shape} and {weights.shape} are not {self._shape}")
        if self._weights is None:
            self._weights = np.full(self._shape, self._weight)
        self._sum.reshape(self._shape)[...] += np.multiply(values, weights, dtype=np.float64)
        self._weights += weights

    @property
    def weights(self) -> np.ndarray | float:
        """The summed weight, of each coordinate where they may differ."""
        return self._weight if self._weights is None else self._weights

    @property
    def covers_nothing(self) -> bool:
        """Whether no coordinate has a mean."""
        return not self._weight > 0 and (self._weights is None or not (self._weights > 0).any())

    @property
    def untouched(self) -> np.ndarray | None:
        """Where no update of positive weight has a say, bool of the tensor's shape; None: nowhere."""
        if self._weights is None:
            return None
        untouched: np.ndarray = self._weights <= 0
        return untouched if untouched.any() else None

    def result(self) -> np.ndarray:
        """The mean, float64, and 0 where `untouched`; call it once, after at least one `add`."""
        if self._weights is None:
            return super().result()
        if self._weights.size and not (self._weights > 0).any():
            raise ValueError("a mean needs at least one update of positive weight")
        total = self._sum.reshape(self._shape)
        mean: np.ndarray = np.divide(total, self._weights, out=np.zeros_like(total), where=self._weights > 0)
        return mean


def _add_at(array: np.ndarray, where: Index, mask: np.ndarray | None, values: np.ndarray | float) -> None:
    """array[where] += values, of which `mask` says the places."""
    if mask is None:
        array[where] += values
    else:
        sub = array[where]
        sub[mask] += values
        array[where] = sub


def _increasing_within(positions: np.ndarray, extent: int) -> bool:
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or not positions.size:
        return False
    return bool(positions[0] >= 0 and positions[-1] < extent and (np.diff(positions) > 0).all())


def _slice_of(positions: np.ndarray | None) -> slice | None:
    if positions is None:
        return slice(None)
    start, stop = int(positions[0]), int(positions[-1]) + 1
    return slice(start, stop) if stop - start == len(positions) else None


def covers(coverages: Sequence[Coverage], shape: tuple[int, ...]) -> np.ndarray:
    """How many of the coverages cover each coordinate, int64 of `shape`."""
    count = np.zeros(shape, dtype=np.int64)
    for coverage in coverages:
        _add_at(count, coverage.index, coverage.mask, 1)
    return count

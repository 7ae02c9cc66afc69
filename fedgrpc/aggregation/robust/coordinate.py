"""Coordinate-wise rules (Yin et al., arXiv 1803.01498), each over those that cover a coordinate.

median          the middle one, or the mean of the two middle ones
trimmed mean    without the b = floor(share * k) smallest and largest of k values, the mean of the others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.errors import UsageError


@dataclass(frozen=True)
class Median:
    """The median of each coordinate. A `CoordinateRule`."""

    least: ClassVar[int] = 1

    def combine(self, updates: np.ndarray) -> np.ndarray:
        """Return the medians."""
        ordered, count = _ordered(updates)
        low, high = np.maximum(count - 1, 0) // 2, count // 2
        columns = np.arange(updates.shape[1])
        middle: np.ndarray = (ordered[low, columns] + ordered[np.minimum(high, len(ordered) - 1), columns]) / 2
        return middle


@dataclass(frozen=True)
class TrimmedMean:
    """The mean without a `share` of each coordinate's values at both ends. A `CoordinateRule`."""

    least: ClassVar[int] = 1
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise UsageError(f"trimmed-mean: share must be from 0 to below 0.5, not {self.share:g}")

    def combine(self, updates: np.ndarray) -> np.ndarray:
        """Return the means."""
        ordered, count = _ordered(updates)
        # A share of 0.1 of 10 values is one value, which a product of floats may miss.
        cut = np.floor(self.share * count + 1e-9).astype(np.int64)
        place = np.arange(len(ordered))[:, None]
        kept = (place >= cut) & (place < count - cut)
        with np.errstate(invalid="ignore"):
            mean: np.ndarray = np.where(kept, ordered, 0.0).sum(axis=0) / kept.sum(axis=0)
        return mean


def _ordered(updates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of each column in order, NaN last, and how many there are that are none."""
    return np.sort(updates, axis=0), np.count_nonzero(~np.isnan(updates), axis=0)

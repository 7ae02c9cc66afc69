"""Krum and Multi-Krum (Blanchard et al., NeurIPS 2017, arXiv 1703.02757).

score_i = sum of the n - f - 2 smallest ||x_i - x_j||^2, j != i

Krum          the update with the smallest score
Multi-Krum    the mean of the n - f updates with the smallest scores
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgrpc.aggregation.robust.rule import squared_distances
from fedgrpc.errors import UsageError


def scores(gram: np.ndarray, f: int) -> np.ndarray:
    """Return Krum's score of each update [n]."""
    between = squared_distances(gram)
    np.fill_diagonal(between, np.inf)
    nearest = max(1, len(gram) - f - 2)
    summed: np.ndarray = np.sort(between, axis=1)[:, :nearest].sum(axis=1)
    return summed


@dataclass(frozen=True)
class Krum:
    """The update that is nearest to its neighbours, with up to `f` attackers. A `DistanceRule`."""

    f: int

    def __post_init__(self) -> None:
        if self.f < 0:
            raise UsageError(f"krum: f must be from 0, not {self.f}")

    @property
    def least(self) -> int:
        """Return 2f + 3, below which the paper proves nothing."""
        return 2 * self.f + 3

    def shares(self, gram: np.ndarray) -> np.ndarray:
        """Return 1 for the chosen update."""
        return _mean_of(scores(gram, self.f), 1)


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the n - f updates that are nearest to their neighbours. A `DistanceRule`."""

    def shares(self, gram: np.ndarray) -> np.ndarray:
        """Return 1 / (n - f) for each chosen update."""
        return _mean_of(scores(gram, self.f), max(1, len(gram) - self.f))


def _mean_of(scores: np.ndarray, count: int) -> np.ndarray:
    shares = np.zeros(len(scores))
    # Stable: of equal scores the first in slot order, whatever numpy's default sort does.
    shares[np.argsort(scores, kind="stable")[:count]] = 1 / count
    return shares

"""Geometric median, as RFA computes it (Pillutla et al., arXiv 1912.13445).

v = argmin sum_i ||v - x_i||

smoothed Weiszfeld:  b_i = 1 / max(nu, ||v - x_i||)        v = sum b_i x_i / sum b_i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from fedgrpc.aggregation.robust.rule import distances_to

_ITERATIONS: Final = 200
_STILL: Final = 1e-10
# Smoothing, as a share of the usual distance: an update that is the median itself would get all of the weight.
_SMOOTH: Final = 1e-6


@dataclass(frozen=True)
class GeometricMedian:
    """The point with the smallest sum of distances to all updates. A `DistanceRule`."""

    least: ClassVar[int] = 1

    def shares(self, gram: np.ndarray) -> np.ndarray:
        """Return the weights of Weiszfeld's iteration once they stand still."""
        count = len(gram)
        shares = np.full(count, 1 / count)
        for _ in range(_ITERATIONS):
            distances = distances_to(gram, shares)
            usual = float(np.median(distances))
            if not usual > 0:
                # Half of the updates and more are one point, which then is the median.
                usual = float(distances.max()) or 1.0
            weights = 1 / np.maximum(distances, _SMOOTH * usual)
            after: np.ndarray = weights / weights.sum()
            if np.abs(after - shares).max() < _STILL:
                return after
            shares = after
        return shares

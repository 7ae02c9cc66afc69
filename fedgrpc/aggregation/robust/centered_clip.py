"""Centered clipping (Karimireddy et al., arXiv 2012.10333).

    v <- v + 1/n sum_i (x_i - v) min(1, tau / ||x_i - v||)

The paper starts from the last round's v, which needs momentum on every device. Here v starts from the geometric
median of this round's updates, and `radius` 0 takes their median distance to it as tau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.aggregation.robust.geometric_median import GeometricMedian
from fedgrpc.aggregation.robust.rule import distances_to
from fedgrpc.errors import UsageError


@dataclass(frozen=True)
class CenteredClip:
    """The mean of updates clipped around a centre. A `DistanceRule`."""

    least: ClassVar[int] = 1
    radius: float = 0.0
    iterations: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.radius < math.inf or not 1 <= self.iterations <= 100:
            raise UsageError("centered-clip: radius must be a number from 0, and iterations from 1 to 100")

    def shares(self, gram: np.ndarray) -> np.ndarray:
        """Return the factors of v after the iterations."""
        count = len(gram)
        shares = GeometricMedian().shares(gram)
        radius = self.radius or float(np.median(distances_to(gram, shares)))
        for _ in range(self.iterations):
            distances = distances_to(gram, shares)
            near = np.where(distances > radius, radius / np.maximum(distances, 1e-300), 1.0)
            shares = shares * (1 - near.mean()) + near / count
        return shares

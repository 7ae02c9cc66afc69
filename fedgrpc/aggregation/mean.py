"""The weighted mean of updates, one tensor at a time: FedAvg (arXiv 1602.05629).

    mean = sum_k p_k * x_k / sum_k p_k

Where updates cover different coordinates, each coordinate is the mean over those who trained it:

    mean[c] = sum_{k covers c} p_k * x_k[c] / sum_{k covers c} p_k        (HeteroFL, arXiv 2010.01264)

A coordinate that nobody covered has no mean, and keeps its value. Where all updates cover everything, this is
`TensorMean` bit for bit.

Updates are added in one canonical order, so the same updates give the same bits, in whatever order they arrived.
Sums are float64, and memory is that of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedgrpc import claims
from fedgrpc.submodels.coverage import Coverage

_PIECE = 1 << 15


class TensorMean:
    """Running weighted mean of tensors of one `shape`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._sum = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype=np.float64)
        self._weight = 0.0

    def add(self, values: np.ndarray, weight: float, *, scale: float = 1.0) -> None:
        """Add `scale * values` with `weight`. `values` has the mean's shape and any real dtype."""
        if values.shape != self._shape:
            raise ValueError(f"shape {values.shape} is not {self._shape}")
        flat = values.reshape(-1)
        scratch = np.empty(min(flat.size, _PIECE))
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            weighted = np.multiply(piece, weight * scale, out=scratch[: piece.size], dtype=np.float64)
            self._sum[start : start + _PIECE] += weighted
        self._weight += weight

    def result(self) -> np.ndarray:
        """Return the mean, float64. Call it once, after at least one `add`."""
        if not self._weight > 0:
            raise ValueError("a mean needs at least one update of positive weight")
        self._sum /= self._weight
        return self._sum.reshape(self._shape)


class CoordinateMean(TensorMean):
    """Running weighted mean of sub-tensors of a tensor of one `shape`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self._weights: np.ndarray | None = None

    def add(
        self, values: np.ndarray, weight: float, coverage: Coverage | None = None, *, scale: float = 1.0
    ) -> None:
        """Add `scale * values` with `weight`. `values` has the coverage's `value_shape`; None covers all."""
        if coverage is None or coverage.whole:
            super().add(values, weight, scale=scale)
            if self._weights is not None:
                self._weights += weight
            return
        self.add_each(values, weight, coverage, scale=scale)

    def add_each(
        self, values: np.ndarray, weight: np.ndarray | float, coverage: Coverage, *, scale: float = 1.0
    ) -> None:
        """Add values that may each have a weight of their own: an array of the shape of `values`."""
        if coverage.shape != self._shape or values.shape != coverage.value_shape:
            raise ValueError(f"shape {values.shape} is not {coverage.value_shape} of {self._shape}")
        # Weights by coordinate are kept only from the first partial update on. Until then one number is enough.
        if self._weights is None:
            self._weights = np.full(self._shape, self._weight)
        weighted = np.multiply(values, weight * scale, dtype=np.float64)
        coverage.add_to(self._sum.reshape(self._shape), weighted)
        coverage.add_to(self._weights, weight)

    def add_mean(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Add values that are a mean themselves, with a weight for each coordinate (float64, from 0)."""
        if values.shape != self._shape or weights.shape != self._shape:
            raise ValueError(f"shapes {values.shape} and {weights.shape} are not {self._shape}")
        if self._weights is None:
            self._weights = np.full(self._shape, self._weight)
        self._sum.reshape(self._shape)[...] += np.multiply(values, weights, dtype=np.float64)
        self._weights += weights

    @property
    def weights(self) -> np.ndarray | float:
        """The summed weight: of each coordinate where they may differ, else one number."""
        return self._weight if self._weights is None else self._weights

    @property
    def covers_nothing(self) -> bool:
        """True if no coordinate has a mean."""
        return not self._weight > 0 and (self._weights is None or not (self._weights > 0).any())

    @property
    def untouched(self) -> np.ndarray | None:
        """The coordinates that no update of positive weight covers, as bool; None: there are none."""
        if self._weights is None:
            return None
        untouched: np.ndarray = self._weights <= 0
        return untouched if untouched.any() else None

    def result(self) -> np.ndarray:
        """Return the mean, float64, and 0 where `untouched`. Call it once, after at least one `add`."""
        if self._weights is None:
            return super().result()
        if self._weights.size and not (self._weights > 0).any():
            raise ValueError("a mean needs at least one update of positive weight")
        total = self._sum.reshape(self._shape)
        mean: np.ndarray = np.divide(total, self._weights, out=np.zeros_like(total), where=self._weights > 0)
        return mean


def mean_of(values_and_weights: Iterable[tuple[np.ndarray, float]], shape: tuple[int, ...]) -> np.ndarray:
    """Return the weighted mean of arrays of `shape`, float64."""
    mean = TensorMean(shape)
    for values, weight in values_and_weights:
        mean.add(values, weight)
    return mean.result()


def mean_metrics(reports: Iterable[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Return the weighted mean of each metric, over the reports of positive weight that have it.

    Names are claims of workers. Each report has one vote, shared among its names, and the names with most votes
    are kept, as many as one report may have. So no worker can push out the few names of the others.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    votes: dict[str, float] = {}
    for metrics, weight in reports:
        for name, value in metrics.items() if weight > 0 else ():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
            votes[name] = votes.get(name, 0.0) + 1 / len(metrics)
    kept = sorted(votes, key=lambda name: (-votes[name], name))[: claims.METRICS]
    return {name: sums[name] / weights[name] for name in sorted(kept)}

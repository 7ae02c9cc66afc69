"""The weighted mean of updates, one tensor at a time: FedAvg (arXiv 1602.05629).

    mean = sum_k p_k * x_k / sum_k p_k

The rule: updates are added in one canonical order, so that the same updates give the same bits, in whatever
order they arrived. Sums are float64; memory is that of the one tensor in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedgrpc import claims

_PIECE = 1 << 15


class TensorMean:
    """Running weighted mean of tensors of one `shape`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._sum = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype=np.float64)
        self._weight = 0.0

    def add(self, values: np.ndarray, weight: float, *, scale: float = 1.0) -> None:
        """Add `scale * values` with `weight`; `values` has the mean's shape and any real dtype."""
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
        """The mean, float64; call it once, after at least one `add`."""
        if not self._weight > 0:
            raise ValueError("a mean needs at least one update of positive weight")
        self._sum /= self._weight
        return self._sum.reshape(self._shape)


def mean_of(values_and_weights: Iterable[tuple[np.ndarray, float]], shape: tuple[int, ...]) -> np.ndarray:
    """The weighted mean of arrays of `shape`, float64."""
    mean = TensorMean(shape)
    for values, weight in values_and_weights:
        mean.add(values, weight)
    return mean.result()


def mean_metrics(reports: Iterable[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """The weighted mean of each metric, over the reports that have it and weigh more than nothing.

    Names are the workers' word: each report has one vote, shared among its names, and the names with most votes
    are kept, as many as one report may have. Whatever one worker makes up, the few names of the others stay.
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

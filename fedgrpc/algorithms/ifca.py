"""IFCA (Ghosh et al., arXiv 2006.04088): k models, of which each device trains the one that fits its data best.

    device:      j = argmin over j of F_k(w_j)         train w_j, leave the others as they are
    aggregator:  w_j <- w_j + sum over k in S_j of p_k (w_jk - w_j) / sum over all k of p_k

Cluster 0 is the model itself, the others are companions `NAME#cluster1`, ... So a download carries k models. An
upload carries one, and zeros, which compress to nothing. As in the paper's gradient averaging (algorithm 1, option
I), a step is divided by all devices and not by those of the cluster.

The clusters have to start apart, or no device could tell them apart: by `spread` times the deviation of each
tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from fedgrpc.aggregation.server_optimizer import ServerOptimizer
from fedgrpc.algorithms.algorithm import Local, Pass, Received, Score, Sent, Trained, Weights
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan

_MOST_CLUSTERS: Final = 16
_CLUSTER: Final = "cluster"


@dataclass(frozen=True)
class Ifca(FedAvg):
    """FedAvg of `clusters` models; scores and loss decide which one a device trains."""

    keeps: ClassVar[bool] = True
    clusters: int = 2
    spread: float = 0.5

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= _MOST_CLUSTERS or not 0 < self.spread < 100:
            raise UsageError(f"ifca: clusters must be from 2 to {_MOST_CLUSTERS}, and spread above 0, below 100")

    @property
    def companions(self) -> tuple[str, ...]:
        """Suffixes of the clusters behind the first."""
        return tuple(f"#cluster{number}" for number in range(1, self.clusters))

    def first_companion(self, suffix: str, name: str, weights: np.ndarray) -> np.ndarray:
        """Start a cluster from the model with noise of its own, the same on every device."""
        rng = np.random.default_rng(zlib.crc32(f"{name}{suffix}".encode()))
        deviation = float(weights.std()) if weights.size > 1 else float(np.abs(weights).sum())
        return np.asarray(weights + self.spread * deviation * rng.standard_normal(weights.shape), weights.dtype)

    def _cluster(self, received: Received, number: int) -> Weights:
        """Return a cluster's model; what is not trained is the same in all."""
        own = received.companions[f"#cluster{number}"] if number else {}
        return {name: own.get(name, values) for name, values in received.model.items()}

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Score every cluster, train the best one, and send it alone."""
        losses: list[float] = []
        for number in range(self.clusters):
            scores: Mapping[str, float] = yield Score(self._cluster(received, number))
            losses.append(scores.get("loss", float("inf")))
        best = int(np.argmin(losses))
        trained: Trained = yield Pass(self._cluster(received, best))
        metrics, kept = {"cluster": float(best)}, {_CLUSTER: np.array([best])}
        if not best:
            return Sent(trained, trained.weights, kept=kept, metrics=metrics)
        suffix = f"#cluster{best}"
        own = {name: trained.weights[name] for name in received.companions[suffix]}
        rest: dict[str, Any] = {
            name: received.model[name] if name in own else values for name, values in trained.weights.items()
        }
        return Sent(trained, rest, {suffix: own}, kept, metrics)

    def personal(self, received: Received) -> Weights:
        """Use the cluster that the device trained last; at first the model itself."""
        number = int(received.kept[_CLUSTER][0]) if _CLUSTER in received.kept else 0
        return self._cluster(received, number if 0 <= number < self.clusters else 0)

    def optimizers(self, inner: ServerOptimizer, workers: int) -> Mapping[str, ServerOptimizer]:
        """Step every cluster with the operator's optimizer."""
        return dict.fromkeys(("", *self.companions), inner)

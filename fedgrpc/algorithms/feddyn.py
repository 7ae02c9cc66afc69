"""FedDyn (Acar et al., arXiv 2111.04263): a dynamic regularizer makes local and global optima agree.

    device:      min_w  F_k(w) - <h_k, w> + alpha/2 ||w - w_t||^2        gradient:  g - h_k + alpha (w - w_t)
                 h_k <- h_k - alpha (w_k - w_t)                          (the gradient of F_k at w_k)
    aggregator:  h   <- h - alpha |S|/N mean_k (w_k - w_t)
                 w   <- mean_k w_k - h / alpha

Nothing travels beside the update: h_k stays on the device, h with the versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.aggregation.server_optimizer import OptimizerState, ServerOptimizer
from fedgrpc.algorithms.algorithm import Local, Pass, Received, Sent, Term, Trained
from fedgrpc.algorithms.companions import trained_names
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.scaffold import check_workers, participation
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan


@dataclass(frozen=True)
class DynamicStep:
    """The aggregator's step of FedDyn, with h as the state; `share` is |S|/N. A `ServerOptimizer`."""

    alpha: float
    share: float
    learning_rate: float = 1.0
    state_count: ClassVar[int] = 1

    def step(
        self, weights: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, OptimizerState]:
        """Step along the mean update."""
        h = state[0] - self.alpha * self.share * delta
        return weights + delta - h / self.alpha, (h,)


@dataclass(frozen=True)
class FedDyn(FedAvg):
    """FedAvg with a dynamic regularizer of the coefficient `alpha`; `workers` as in SCAFFOLD."""

    keeps: ClassVar[bool] = True
    alpha: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        check_workers("feddyn", self.workers)
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"feddyn: alpha must be a number above 0, not {self.alpha:g}")

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Train with -h_k in the gradient and a pull of alpha, and keep the new h_k."""
        start, h = received.model, received.kept
        names = trained_names(start)
        offset = {name: -h[name] for name in names if name in h}
        trained: Trained = yield Pass(start, Term(self.alpha, offset))
        after = trained.weights
        kept = {
            name: np.asarray(h.get(name, 0.0) - self.alpha * (after[name] - start[name]), start[name].dtype)
            for name in names
        }
        return Sent(trained, after, kept=kept)

    def optimizers(self, inner: ServerOptimizer, workers: int) -> Mapping[str, ServerOptimizer]:
        """Step as FedDyn does, in place of the operator's optimizer."""
        return {"": DynamicStep(self.alpha, participation(workers, self.workers))}

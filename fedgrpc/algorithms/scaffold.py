"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378): control variates take client drift out of the gradient.

    device:      y <- y - eta (g - c_k + c)                          K steps from x
                 c_k+ = c_k - c + (x - y) / (K eta)                  (option II)
    aggregator:  x <- x + mean_k (y_k - x)
                 c <- c + |S|/N mean_k (c_k+ - c_k)

The global variate c travels as the companion `NAME#control` of each trained tensor, and the change of c_k as its
difference. So a round carries two models each way. c_k stays on the device.

With momentum rho, K steps amount to K gradients times about 1 / (1 - rho). The sum x - y is divided by that number
exactly (`accumulated_steps`), so that c_k keeps the size of a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from fedgrpc.aggregation.scaling import accumulated_steps
from fedgrpc.aggregation.server_optimizer import PlainStep, ServerOptimizer
from fedgrpc.algorithms.algorithm import Local, Pass, Received, Sent, Term, Trained
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan

CONTROL: Final = "#control"


def check_workers(name: str, workers: int) -> None:
    """Raise `UsageError` for a number of devices that cannot be; 0: all take part in every round."""
    if workers < 0:
        raise UsageError(f"{name}: workers must be from 0, not {workers}")


def participation(taking_part: int, workers: int) -> float:
    """Return |S|/N: the share of `workers` devices that took part; 1 if there are always all (0)."""
    return min(1.0, taking_part / workers) if workers else 1.0


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg with control variates. `workers` is N, the devices of the run; 0: all take part in every round."""

    keeps: ClassVar[bool] = True
    workers: int = 0

    def __post_init__(self) -> None:
        check_workers("scaffold", self.workers)

    @property
    def companions(self) -> tuple[str, ...]:
        """The global control variate."""
        return (CONTROL,)

    def check(self, plan: TrainingPlan) -> None:
        """Raise `UsageError` unless the size of a step is known: a variate is a sum of steps, divided by it."""
        if plan.learning_rate is None or plan.momentum is None:
            raise UsageError(
                "scaffold needs --learning-rate and --momentum, by which it divides what training changed"
            )

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Train with c - c_k in the gradient, and send how c_k changed."""
        x, c = received.model, received.companions[CONTROL]
        own = {name: received.kept.get(name, np.zeros_like(c[name])) for name in c}
        trained: Trained = yield Pass(x, Term(offset={name: c[name] - own[name] for name in c}))
        size = accumulated_steps(max(1, trained.steps), plan.momentum or 0.0) * (plan.learning_rate or 1.0)
        y = trained.weights
        after = {name: _as(own[name], own[name] - c[name] + (x[name] - y[name]) / size) for name in c}
        sent = {name: _as(own[name], c[name] + (after[name] - own[name])) for name in c}
        return Sent(trained, y, {CONTROL: sent}, after)

    def optimizers(self, inner: ServerOptimizer, workers: int) -> Mapping[str, ServerOptimizer]:
        """Move c by |S|/N of the mean change."""
        return {"": inner, CONTROL: PlainStep(participation(workers, self.workers))}


def _as(like: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(values, like.dtype)

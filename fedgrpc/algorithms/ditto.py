"""Ditto (Li et al., arXiv 2012.04221): each device also trains a model of its own, held near the global one.

    device:      w_k as in FedAvg, and        min_v  F_k(v) + lambda/2 ||v - w_t||^2        from the last v_k
    aggregator:  FedAvg of w_k

v_k never leaves the device. Scores are those of v_k, since that is the model that the device uses. A round trains
twice: `share` of the plan's epochs are for v_k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedgrpc.algorithms.algorithm import Local, Pass, Received, Score, Sent, Term, Trained, Weights
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.personal import with_own
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan


@dataclass(frozen=True)
class Ditto(FedAvg):
    """FedAvg, beside which every device trains a model of its own, pulled with `strength` (lambda)."""

    keeps: ClassVar[bool] = True
    strength: float = 0.1
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf or not 0 < self.share < math.inf:
            raise UsageError("ditto: strength must be a number from 0, and share above 0")

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Train the global model, then the device's own."""
        trained: Trained = yield Pass(received.model)
        sent = {name: values.copy() for name, values in trained.weights.items()}
        term = Term(self.strength, anchor=received.model)
        own: Trained = yield Pass(self.personal(received), term, self.share)
        scores: Mapping[str, float] = yield Score(own.weights)
        metrics = {f"personal_{name}": value for name, value in scores.items()}
        return Sent(trained, sent, kept=dict(own.weights), metrics=metrics)

    def personal(self, received: Received) -> Weights:
        """Use the device's own model; at first it is the global one."""
        return with_own(received, received.model.keys())

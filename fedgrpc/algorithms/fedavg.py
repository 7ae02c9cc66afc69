"""FedAvg (McMahan et al., arXiv 1602.05629): train from the global model, average.

    device:      w_k = w - eta sum of gradients
    aggregator:  w + sum_k p_k (w_k - w) / sum_k p_k

Every other algorithm here is this one with a half changed, or both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.aggregation.server_optimizer import ServerOptimizer
from fedgrpc.algorithms.algorithm import NO_TERM, Counted, Local, Pass, Received, Sent, Term, Trained, Weights
from fedgrpc.training_plan import TrainingPlan


@dataclass(frozen=True)
class FedAvg:
    """The algorithm without any addition. An `Algorithm`."""

    uses_norms: ClassVar[bool] = False
    uses_losses: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    normalizes: ClassVar[bool] = False

    @property
    def companions(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def mu(self) -> float:
        """No pull."""
        return 0.0

    def check(self, plan: TrainingPlan) -> None:
        """Accept every plan."""

    def first_companion(self, suffix: str, name: str, weights: np.ndarray) -> np.ndarray:
        """Start companions at zero."""
        return np.zeros_like(weights)

    def term(self, received: Received) -> Term:
        """Return the term of the training that `local` asks for."""
        return NO_TERM

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Train once from the global model, and send what came of it."""
        trained: Trained = yield Pass(received.model, self.term(received))
        return Sent(trained, trained.weights)

    def personal(self, received: Received) -> Weights:
        """Use the global model."""
        return received.model

    def scales(self, updates: Sequence[Counted], plan: TrainingPlan) -> list[float]:
        """Leave every update as it is."""
        return [1.0] * len(updates)

    def mixing(self, staleness: int) -> float | None:
        """Add differences."""
        return None

    def optimizers(self, inner: ServerOptimizer, workers: int) -> Mapping[str, ServerOptimizer]:
        """Step with the operator's optimizer."""
        return {"": inner}

"""FedNova (Wang et al., arXiv 2007.07481): updates count by their direction, not by the number of their steps.

    d_k = (w_k - w) / ||a_k||_1          w + tau_eff sum_k p_k d_k          tau_eff = sum_k p_k ||a_k||_1

`fedgrpc.aggregation.scaling` has ||a||_1 and the bound on what a worker may claim. `fedgrpc.runs.weighing` applies
them, to the means of leaves too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedgrpc.algorithms.algorithm import Received, Term
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan


@dataclass(frozen=True)
class FedNova(FedAvg):
    """FedAvg of normalized updates, with FedProx's pull where `mu` is above 0."""

    normalizes: ClassVar[bool] = True
    mu: float = 0.0

    def check(self, plan: TrainingPlan) -> None:
        """Raise `UsageError` unless the size of a step is known."""
        if not self.mu:
            return
        if plan.momentum:
            raise UsageError("fednova knows of no steps with both momentum and mu")
        if plan.learning_rate is None or not 0 < plan.learning_rate * self.mu < 1:
            raise UsageError("fednova with mu needs a learning_rate of less than 1 / mu")

    def term(self, received: Received) -> Term:
        """Pull towards the start, if at all."""
        return Term(self.mu)

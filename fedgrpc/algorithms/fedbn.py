"""FedBN (Li et al., arXiv 2102.07623): normalization layers stay on the device, all others are averaged.

    device:  theta_k = (shared w, own normalization); train both, send w alone

By default the normalization layers are those with running statistics, known by their names. Name others, such as
GroupNorm, by globs: `fedbn:layers=norm*+*.gn.*`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from fedgrpc.algorithms.algorithm import Local, Pass, Received, Sent, Trained, Weights
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.personal import matching, with_own, without
from fedgrpc.training_plan import TrainingPlan

_MEASURED = ("running_mean", "running_var")


@dataclass(frozen=True)
class FedBN(FedAvg):
    """FedAvg of everything but the normalization layers."""

    keeps: ClassVar[bool] = True
    layers: tuple[str, ...] = ()

    def own(self, names: Collection[str]) -> list[str]:
        """Return the names of the tensors that stay on the device."""
        if self.layers:
            return matching(names, self.layers)
        prefixes = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in _MEASURED}
        return matching(names, tuple(sorted(f"{prefix}.*" for prefix in prefixes)) or ("*.running_mean",))

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Train all, keep the normalization, send the rest."""
        own = frozenset(self.own(list(received.model)))
        trained: Trained = yield Pass(with_own(received, own))
        kept = {name: trained.weights[name] for name in sorted(own)}
        return Sent(trained, without(trained.weights, received, own.__contains__), kept=kept)

    def personal(self, received: Received) -> Weights:
        """Use the global model with the device's own normalization."""
        return with_own(received, frozenset(self.own(list(received.model))))

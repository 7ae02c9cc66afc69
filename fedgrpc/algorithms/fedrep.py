"""FedRep (Collins et al., arXiv 2102.07078): a shared representation, and a head of each device's own.

device:  h_k <- argmin of F_k(phi, h), phi fixed        for a share of the steps
         phi_k <- step of F_k(phi, h_k), h_k fixed      for the others; send phi_k alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedgrpc.algorithms.algorithm import Local, Pass, Received, Sent, Term, Trained, Weights
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.personal import matching, with_own, without
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan


@dataclass(frozen=True)
class FedRep(FedAvg):
    """FedAvg of the representation. `head` has globs of the head's tensors, `head_share` its epochs."""

    keeps: ClassVar[bool] = True
    head: tuple[str, ...]
    head_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.head_share < 1:
            raise UsageError(f"fedrep: head_share must be above 0 and below 1, not {self.head_share:g}")

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Train the head, then the representation; keep the one, send the other."""
        head = frozenset(matching(list(received.model), self.head))
        body = tuple(name for name in received.model if name not in head)
        first: Trained = yield Pass(with_own(received, head), Term(trains=tuple(sorted(head))), self.head_share)
        start = {name: first.weights[name] if name in head else received.model[name] for name in received.model}
        second: Trained = yield Pass(start, Term(trains=body), 1 - self.head_share)
        kept = {name: second.weights[name] for name in sorted(head)}
        return Sent(second, without(second.weights, received, head.__contains__), kept=kept)

    def personal(self, received: Received) -> Weights:
        """Use the shared representation with the device's own head."""
        return with_own(received, frozenset(matching(list(received.model), self.head)))

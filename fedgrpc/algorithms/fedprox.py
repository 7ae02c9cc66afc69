"""FedProx (Li et al., arXiv 1812.06127): a pull towards the global model.

device:  min_w  F_k(w) + mu/2 ||w - w_t||^2        gradient:  g + mu (w - w_t)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedgrpc.algorithms.algorithm import Received, Term
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.errors import UsageError


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term of the coefficient `mu`."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.mu < math.inf:
            raise UsageError(f"fedprox: mu must be a number above 0, not {self.mu:g}")

    def term(self, received: Received) -> Term:
        """Pull towards the start."""
        return Term(self.mu)

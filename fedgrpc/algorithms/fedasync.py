"""FedAsync (Xie, Koyejo and Gupta, arXiv 1903.03934): each update makes a version, a mix of two models.

    device:      x_k = training from x_tau, with FedProx's pull towards x_tau
    aggregator:  x <- (1 - a_t) x + a_t x_k                      a_t = alpha s(t - tau)

    constant:    s(n) = 1
    polynomial:  s(n) = (n + 1)^-a
    hinge:       s(n) = 1 for n <= b, else 1 / (a (n - b) + 1)

n counts the versions made since the worker got its model. An update is a difference to x_tau, which the aggregator
keeps while a task works on it: x_k = x_tau + difference. Where models travel by a lossy encoding, the worker began
from x_tau as it got it, and what that lost is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedgrpc.algorithms.algorithm import Received, Term
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.errors import UsageError

_FUNCTIONS: Final = ("constant", "polynomial", "hinge")


@dataclass(frozen=True)
class FedAsync(FedAvg):
    """Mixing by `alpha` and the staleness function `s` of `a` and `b`; devices have FedProx's pull by `mu`."""

    mu: float = 0.0
    alpha: float = 0.6
    s: str = "polynomial"
    a: float = 0.5
    b: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise UsageError(f"fedasync: mu must be a number from 0, not {self.mu:g}")
        if not 0 < self.alpha <= 1:
            raise UsageError(f"fedasync: alpha must be above 0, at most 1, not {self.alpha:g}")
        if self.s not in _FUNCTIONS:
            raise UsageError(f"fedasync: s must be {', '.join(_FUNCTIONS)}, not {self.s!r}")
        if not 0 < self.a < math.inf or self.b < 0:
            raise UsageError(f"fedasync: a must be above 0, and b from 0, not {self.a:g} and {self.b}")

    def term(self, received: Received) -> Term:
        """Pull towards the start, if at all."""
        return Term(self.mu)

    def mixing(self, staleness: int) -> float:
        """Return a_t of a model that is so many versions old."""
        return self.alpha * self._of(staleness)

    def _of(self, staleness: int) -> float:
        if self.s == "constant":
            return 1.0
        if self.s == "polynomial":
            return float((staleness + 1) ** -self.a)
        return 1.0 if staleness <= self.b else 1 / (self.a * (staleness - self.b) + 1)

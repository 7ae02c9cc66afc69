"""q-FedAvg (Li et al., arXiv 1905.10497): devices with a higher loss count for more, for fairer accuracy.

    L = 1 / eta        D_k = L (w - w_k)        F_k: loss of device k at w
    Delta_k = F_k^q D_k                h_k = q F_k^(q-1) ||D_k||^2 + L F_k^q
    aggregator:  w <- w - sum_k Delta_k / sum_k h_k

As factors on the updates x_k = w_k - w, of which the weighted mean is taken with the weights p_k:

    scale_k = F_k^q L sum_j p_j / (p_k sum_j h_j)

A loss is a claim of its device, on which the others' updates depend. It counts for at most `MOST_TIMES_MEDIAN`
times the median. q = 0 is the plain mean of the devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import ClassVar, Final

from fedgrpc.algorithms.algorithm import Counted
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan

MOST_TIMES_MEDIAN: Final = 10.0
# A loss of zero has no power of q - 1 below 1.
_LEAST: Final = 1e-10


@dataclass(frozen=True)
class QFedAvg(FedAvg):
    """FedAvg that reweighs by the power `q` of each device's loss of the global model on its held-out examples."""

    uses_norms: ClassVar[bool] = True
    uses_losses: ClassVar[bool] = True
    q: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.q < math.inf:
            raise UsageError(f"qfedavg: q must be a number from 0, not {self.q:g}")

    def check(self, plan: TrainingPlan) -> None:
        """Raise `UsageError` unless eta is known."""
        if plan.learning_rate is None:
            raise UsageError("qfedavg needs --learning-rate, from which it takes its Lipschitz constant")

    def scales(self, updates: Sequence[Counted], plan: TrainingPlan) -> list[float]:
        """Return the factors. A device without a loss counts as the median, and one without weight for nothing."""
        counted = [each for each in updates if each.weight > 0]
        losses = [max(_LEAST, each.loss) for each in counted if each.loss is not None]
        if not losses:
            return [1.0] * len(updates)
        usual, lipschitz = median_low(losses), 1 / (plan.learning_rate or 1.0)

        def loss(update: Counted) -> float:
            return usual if update.loss is None else min(max(_LEAST, update.loss), MOST_TIMES_MEDIAN * usual)

        def h(update: Counted) -> float:
            square = (lipschitz * (update.norm or 0.0)) ** 2
            return float(self.q * loss(update) ** (self.q - 1) * square + lipschitz * loss(update) ** self.q)

        total, weights = math.fsum(map(h, counted)), math.fsum(each.weight for each in counted)
        return [
            loss(each) ** self.q * lipschitz * weights / (each.weight * total) if each.weight > 0 else 1.0
            for each in updates
        ]

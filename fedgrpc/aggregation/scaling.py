"""How far an update counts before it is averaged: for unequal local work, for its length, and for coming late.

Both are factors on the update itself, never on its weight, so that the mean is still one over all who reported:

    mean = sum_k p_k * scale_k * x_k / sum_k p_k
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# The data of a fleet differ by less.
MOST_TIMES_MEDIAN: Final = 50.0


def accumulated_steps(steps: int, momentum: float = 0.0, proximal: float = 0.0) -> float:
    """||a||_1 of FedNova (arXiv 2007.07481): how many gradients `steps` local steps amount to.

    Plain SGD: `steps`. With momentum rho: (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho). With FedProx,
    alpha being learning rate times mu: (1 - (1 - alpha)^steps) / alpha. The paper gives none for both at once.
    Raises `ValueError` for that, for no step at all, and for coefficients not from 0 to below 1.
    """
    if steps < 1 or not 0 <= momentum < 1 or not 0 <= proximal < 1 or (momentum and proximal):
        raise ValueError(f"steps {steps}, momentum {momentum:g}, proximal {proximal:g}")
    if momentum:
        return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    if proximal:
        return float((1 - (1 - proximal) ** steps) / proximal)
    return float(steps)


def nova_scales(weights: Sequence[float], accumulated: Sequence[float]) -> list[float]:
    """FedNova's factor for each update (arXiv 2007.07481): tau_eff / ||a_k||_1.

    tau_eff is the bounded mean of ||a_k||_1, which keeps the length of the step. Updates of equal work stay as
    they are, to the last bit. Raises `ValueError` when nothing has weight, or an update has no work in it.
    """
    if not sum(weights) > 0 or not all(steps > 0 for steps in accumulated):
        raise ValueError("normalizing needs updates of positive weight and work")
    if len(set(accumulated)) == 1:
        return [1.0] * len(accumulated)
    effective = effective_steps(weights, accumulated)
    return [effective / a for a in accumulated]


def effective_steps(weights: Sequence[float], accumulated: Sequence[float]) -> float:
    """FedNova's tau_eff as it is used here: the weighted mean of ||a_k||_1. The weights are not all zero.

    No ||a_k||_1 counts for more than `MOST_TIMES_MEDIAN` times the weighted median: it is a worker's word, and the
    updates of all others are multiplied with the mean.

    A mean of updates so normalized is itself an update of that much work: normalized with others and averaged, it
    counts as its updates would.
    """
    most = MOST_TIMES_MEDIAN * _median(weights, accumulated)
    return sum(w * min(a, most) for w, a in zip(weights, accumulated, strict=True)) / sum(weights)


def _median(weights: Sequence[float], values: Sequence[float]) -> float:
    """The smallest value that those of at least half of the weight do not exceed."""
    half, so_far = sum(weights) / 2, 0.0
    ordered = sorted(zip(values, weights, strict=True))
    for value, weight in ordered:
        so_far += weight
        if so_far >= half:
            return value
    return ordered[-1][0]


def clip_scale(norm: float, bound: float) -> float:
    """min(1, C / norm): the factor that makes an update no longer than C (arXiv 1710.06963)."""
    return min(1.0, bound / norm) if norm > 0 else 1.0


def staleness_scale(staleness: int, exponent: float = 0.5) -> float:
    """FedBuff's factor (1 + staleness)^-exponent for a late update (arXiv 2106.06639).

    `staleness`: how many versions were committed since its worker was given the model; `exponent` 0: no discount.
    """
    if staleness < 0 or exponent < 0:
        raise ValueError(f"staleness {staleness}, exponent {exponent:g}")
    return float((1 + staleness) ** -exponent)

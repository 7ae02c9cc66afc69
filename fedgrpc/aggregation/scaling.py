"""Factors on an update before it is averaged: for unequal local work, for its length, and for its staleness.

They scale the update itself, never its weight, so the mean is still one over all who reported:

    mean = sum_k p_k * scale_k * x_k / sum_k p_k
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

# The amounts of local work in a fleet differ by less.
MOST_TIMES_MEDIAN: Final = 50.0


def accumulated_steps(steps: int, momentum: float = 0.0, proximal: float = 0.0) -> float:
    """Return ||a||_1 of FedNova (arXiv 2007.07481): how many gradients `steps` local steps amount to.

    Plain SGD: `steps`. With momentum rho: (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho). With FedProx,
    where alpha is learning rate times mu: (1 - (1 - alpha)^steps) / alpha. The paper gives none for both at once.
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
    """Return FedNova's factor for each update (arXiv 2007.07481): tau_eff / ||a_k||_1.

    tau_eff is the bounded mean of ||a_k||_1, which keeps the length of the step. Updates of equal work keep every
    bit. Raises `ValueError` when nothing has weight, or an update has no work in it.
    """
    if not sum(weights) > 0 or not all(steps > 0 for steps in accumulated):
        raise ValueError("normalizing needs updates of positive weight and work")
    if len(set(accumulated)) == 1:
        return [1.0] * len(accumulated)
    effective = effective_steps(weights, accumulated)
    return [effective / a for a in accumulated]


def effective_steps(weights: Sequence[float], accumulated: Sequence[float]) -> float:
    """Return FedNova's tau_eff as used here: the weighted mean of ||a_k||_1. The weights are not all zero.

    No ||a_k||_1 counts for more than `MOST_TIMES_MEDIAN` times the weighted median: it is a worker's claim, and
    the updates of all others are multiplied by the mean.

    A mean of updates so normalized is itself an update of that much work. Normalized with others and averaged, it
    counts as its updates would.
    """
    most = MOST_TIMES_MEDIAN * _median(weights, accumulated)
    return sum(w * min(a, most) for w, a in zip(weights, accumulated, strict=True)) / sum(weights)


def _median(weights: Sequence[float], values: Sequence[float]) -> float:
    """Return the smallest value that those of at least half of the weight do not exceed."""
    half, so_far = sum(weights) / 2, 0.0
    ordered = sorted(zip(values, weights, strict=True))
    for value, weight in ordered:
        so_far += weight
        if so_far >= half:
            return value
    return ordered[-1][0]


def clip_scale(norm: float, bound: float) -> float:
    """Return min(1, C / norm), the factor that makes an update no longer than C (arXiv 1710.06963)."""
    return min(1.0, bound / norm) if norm > 0 else 1.0


def quantile(values: Collection[float], share: float) -> float:
    """Return the smallest value that at least `share` of them do not exceed. Raises `ValueError` for none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a quantile needs a value")
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def staleness_scale(staleness: int, exponent: float = 0.5) -> float:
    """Return FedBuff's factor (1 + staleness)^-exponent for a late update (arXiv 2106.06639).

    `staleness` counts the versions committed since its worker got the model. `exponent` 0 gives no discount.
    """
    if staleness < 0 or exponent < 0:
        raise ValueError(f"staleness {staleness}, exponent {exponent:g}")
    return float((1 + staleness) ** -exponent)

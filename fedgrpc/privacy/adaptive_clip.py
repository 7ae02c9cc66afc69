"""A clip norm that follows a quantile of the norms, without looking at one (Andrew et al., arXiv 1905.03871).

Each device says by one bit whether its update was no longer than the clip norm C. From m devices of a round and
the noisy count of such bits follows the clip norm of the next round, for the quantile q:

    f = 1/2 + (sum_i (b_i - 1/2) + Normal(0, sigma_b^2)) / m
    C <- C * exp(-0.2 * (f - q))

One device moves the sum by at most 1/2, and so the count is a Gaussian mechanism of the multiplier 2 sigma_b. The
rule: both releases of a round together cost what one of the multiplier z would. So the update gets more noise:

    z_update = (z^-2 - (2 sigma_b)^-2)^(-1/2)

This holds for Poisson samples, too: update and bit are one vector of one sampled device, no longer than 1 / z in
units of its noise.
"""

from __future__ import annotations

import math
from typing import Final

# The paper's: sigma_b is a twentieth of the devices, and the rate of the geometric step.
_SHARE_OF_COHORT: Final = 1 / 20
_RATE: Final = 0.2


def count_deviation(multiplier: float, cohort: int) -> float:
    """Return sigma_b, the standard deviation of the noisy count, of a round whose releases have `multiplier`.

    m / 20 as in the paper, and z for small cohorts, where m / 20 would take most of the budget: so the noise of
    an update grows by no more than 2 / sqrt(3), 15 %.
    """
    return max(_SHARE_OF_COHORT * cohort, multiplier)


def update_multiplier(multiplier: float, cohort: int) -> float:
    """Return z_update, the noise multiplier of the updates beside a count."""
    return float((multiplier**-2 - (2 * count_deviation(multiplier, cohort)) ** -2) ** -0.5)


def next_clip_norm(clip_norm: float, quantile: float, fits: int, count: int, noise: float, cohort: int) -> float:
    """Return the clip norm of the rounds that follow: `fits` of `count` updates were no longer than it.

    `noise` is the count's. What does not arrive says nothing, so that its sum stays as if it were not there.
    """
    share = 0.5 + (fits - count / 2 + noise) / cohort
    # A share is none beyond 0 and 1: so no draw moves the clip norm by more than a fifth.
    return clip_norm * math.exp(-_RATE * (min(1.0, max(0.0, share)) - quantile))

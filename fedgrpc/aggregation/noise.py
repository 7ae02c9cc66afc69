"""The say of an update by the noise that its number format adds.

    noise ratio  rho = ||d - d32||^2 / ||d32||^2        d: the update, d32: that of the same steps in float32
    say          s = 1 / (1 + rho)                      factor on the update's weight

Inverse variance: an update of the variance V with an error of the mean square rho * V is weighed by
1 / (V + rho * V), relative to one without the error. docs/heterogeneity.md derives it.

The rule: the ratio is a claim of the worker, and the say is at most 1. So a claim can only lower the weight of the
worker that makes it. Without an error the say is exactly 1, and the mean keeps every bit.
"""

from __future__ import annotations


def say(noise_ratio: float) -> float:
    """Return the factor on an update's weight: above 0, at most 1; `noise_ratio` is from 0 and finite."""
    return 1.0 / (1.0 + noise_ratio)

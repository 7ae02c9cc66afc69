"""Rounding that leaves no update longer than a norm, and sums that one update moves by no more than that.

Noise hides a device whose update is at most C long in the sum, and a secure sum adds updates after rounding. With
d values on a grid of the step g, the rounded R(x) is longer than x (Kairouz, Liu, Steinke, arXiv 2102.06387):

    |R(x)|^2 <= |x|^2 + g^2 d / 4 + sqrt(2 ln(1/b)) g (|x| + g sqrt(d) / 2)    except with the chance b
    |R(x)|   <= |x| + g sqrt(d)                                                always

The rule: a device clips x to the length for which one right side is C, and draws the rounding again until R(x) is
at most C long ("conditional rounding"). So no device adds more than C, and the loss has no part for rounding.

The grid follows from C, d and the bits alone, and tells nothing of updates: with g = C / (2 sqrt(d)) rounding
takes 3 % of the length, and the bits say how far values reach.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from fedgrpc.codec.layout import Array

# So seldom is a rounding drawn again.
_CHANCE: Final = 1e-6


def grid_bound(norm: float, size: int, bits: int) -> float:
    """Return the largest value on the grid of `bits` bits, for updates of `size` values at most `norm` long.

    That is 2^bits / 4 times the value that all have in an update of that length, and at most `norm`.
    """
    step = norm / (2 * math.sqrt(max(1, size)))
    return min(norm, step * ((1 << bits) - 1) / 2)


def clip_norm(norm: float, step: float, size: int) -> float:
    """Return the length of an update before rounding with which it is at most `norm` long after it."""
    # In units of the norm: g, and g sqrt(d).
    unit, across = step / norm, step / norm * math.sqrt(size)
    slack = math.sqrt(-2 * math.log(_CHANCE)) * unit
    rest = 1 - across**2 / 4 - slack * across / 2
    likely = (math.sqrt(max(0.0, slack**2 + 4 * rest)) - slack) / 2
    return norm * max(likely, 1 - across)


def squared_length(integers: Array, bits: int) -> float:
    """Return the squared length of rounded values, in half steps: of 2 q - (2^bits - 1)."""
    doubled = 2.0 * integers - ((1 << bits) - 1)
    return float(doubled @ doubled)


def folded(total: Array, count: int, bits: int, sum_bits: int) -> Array:
    """Return the sums of `count` values in half steps, int64, from those of their integers modulo 2^sum_bits.

    `sum_bits` has one bit more than the sums of honest devices need. One who adds anything can make others' sums
    overflow. They would then jump by the modulus, for one value of a third device and not for the next, and noise
    would not hide that one. So the half of the circle that honest sums do not reach is folded back: wherever a sum
    is, a device that adds q moves it by at most |2 q - (2^bits - 1)|.
    """
    around, most = 2 << sum_bits, 1 << (sum_bits - 1)
    doubled: Array = 2 * total.astype(np.int64) - count * ((1 << bits) - 1)
    doubled = np.where(doubled >= around // 2, doubled - around, doubled)
    doubled = np.where(doubled > most, 2 * most - doubled, doubled)
    return np.where(doubled < -most, -2 * most - doubled, doubled)

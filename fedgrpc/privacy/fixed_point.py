"""Updates as integers that add up exactly: what a secure sum adds.

    q = floor((clip(x, -c, c) + c) / step + u),   step = 2 c / (2^b - 1),   u uniform in [0, 1)
    sum_k w_k x_k / sum_k w_k  is estimated by  step * (sum_k w_k q_k / sum_k w_k) - c

Stochastic rounding keeps the mean right: E[q] = (x + c) / step for every x within the bound. The rule: bound and
bits come with the task and are the same for all, so integers of different devices mean the same. A sum of n of
them with weights below 2^w has b + w + ceil(log2 n) bits, and never overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.errors import EncodeError, UpdateRefused, UsageError
from fedgrpc.privacy.masks import MAX_PACKED_BITS

# What `masks` packs.
MAX_SUM_BITS = MAX_PACKED_BITS


@dataclass(frozen=True)
class FixedPoint:
    """Grid of one tensor: `count` devices, values within `bound` of 0 at `bits` bits, weights of `weight_bits`.

    A sum has `spare_bits` more than it needs.
    """

    bound: float
    bits: int
    weight_bits: int
    count: int
    spare_bits: int = 0

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 24 and 0 <= self.weight_bits <= 32 and self.count >= 1):
            raise UsageError("a secure sum takes values of 2 to 24 bits, and weights of at most 32")
        # A bound next to the end of what floats hold has a step of 0, or of infinity.
        if not (np.isfinite(self.step) and self.step > 0):
            raise UsageError(f"the bound of a secure sum's values is a number above 0, not {self.bound}")
        if self.sum_bits > MAX_SUM_BITS:
            raise UsageError(f"this secure sum needs {self.sum_bits} bits an element, more than {MAX_SUM_BITS}")

    @property
    def step(self) -> float:
        """The distance of two neighbours on the grid."""
        return 2 * self.bound / ((1 << self.bits) - 1)

    @property
    def sum_bits(self) -> int:
        """Bits of a sum: all arithmetic is modulo 2 to this power."""
        return self.bits + self.weight_bits + (self.count - 1).bit_length() + self.spare_bits

    def encode(self, values: Array, weight: int, rng: np.random.Generator) -> Array:
        """Return `weight` times the integers of `values` (floats of any shape), uint64, below 2^`sum_bits`.

        Raises EncodeError for values that are not finite, and for a weight that is not in 1..2^weight_bits - 1, or
        1 where weights have no bits.
        """
        if not 1 <= weight < max(2, 1 << self.weight_bits):
            raise EncodeError(f"the weight {weight} does not fit {self.weight_bits} bits")
        if not np.isfinite(values).all():
            raise EncodeError("a tensor holds NaN or infinity: it cannot be part of a secure sum")
        scaled = values.astype(np.float64)
        np.clip(scaled, -self.bound, self.bound, out=scaled)
        scaled += self.bound
        scaled /= self.step
        scaled += rng.random(values.shape)
        # Rounding errors of the division must not lift the largest value over the grid's end.
        np.minimum(scaled, (1 << self.bits) - 1, out=scaled)
        # Nothing is below 0, so leaving out the fraction is the floor.
        encoded: Array = scaled.astype(np.uint64)
        encoded *= np.uint64(weight)
        return encoded

    def mean(self, total: Array, weight: int) -> Array:
        """Return the weighted mean, float64, from the sum of integers and that of weights.

        Raises UpdateRefused for sums that no honest devices make: the only check that values get, since no single
        update can be seen. It catches noise and not every lie.
        """
        most = self.count * max(1, (1 << self.weight_bits) - 1)
        if not 1 <= weight <= most:
            raise UpdateRefused(f"the weights of a secure sum add up to {weight}, and not to 1 to {most}")
        if int(total.max(initial=0)) > weight * ((1 << self.bits) - 1):
            raise UpdateRefused("a secure sum is above what its weights allow: a device sent no update")
        mean: Array = total.astype(np.float64) / weight * self.step - self.bound
        return mean

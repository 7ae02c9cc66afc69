"""Random numbers of devices: the n-th number of a device depends on the seed, the device and n alone.

The rule: in whatever order devices ask, each gets the same numbers. A simulation that resumes has another order,
and is still the one that was not cut off. How many each has taken is the whole state.

Numbers are SplitMix64's (Steele, Lea and Flood, OOPSLA 2014) of a counter for each device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
# Of 64 bits the upper 53 fit into a float.
_UNUSED_BITS: Final = 11
_UNIT: Final = 2.0**-53


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mixed_all(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return np.asarray(values ^ (values >> np.uint64(31)))


class DeviceDraws:
    """The random numbers of `count` devices, by their index."""

    def __init__(self, seed: Sequence[int], count: int) -> None:
        key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        # Where the counter of each device begins.
        self._begins = _mixed_all(key + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP))
        self.taken = np.zeros(count, np.uint64)

    def uniform(self, device: int) -> float:
        """Return the next number of a device, from 0 to below 1."""
        taken = int(self.taken[device]) + 1
        self.taken[device] = taken
        return (_mixed((int(self._begins[device]) + taken * _STEP) & _MASK) >> _UNUSED_BITS) * _UNIT

    def uniforms(self, devices: np.ndarray) -> np.ndarray:
        """Return the next number of each of these devices, of which none is named twice."""
        self.taken[devices] += np.uint64(1)
        values = _mixed_all(self._begins[devices] + self.taken[devices] * np.uint64(_STEP))
        return (values >> np.uint64(_UNUSED_BITS)) * _UNIT

    def normal(self, device: int) -> float:
        """Return a standard normal number of a device (Box and Muller 1958)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform(device)))
        return radius * math.cos(2.0 * math.pi * self.uniform(device))

    def exponentials(self, devices: np.ndarray, means: np.ndarray) -> np.ndarray:
        """Return an exponential number with that mean of each of these devices."""
        return np.asarray(means * -np.log1p(-self.uniforms(devices)))

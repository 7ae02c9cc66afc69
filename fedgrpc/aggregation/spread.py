"""The spread of a buffer's values, in which one update alone has no say.

    least[c]    the second smallest of what the base and the updates say of element c
    most[c]     the second largest

A norm bounds what an update makes of parameters, which travel as differences. Buffers are values of any size, so
the rule for them is another: what one update alone says counts as the nearest value that the base or another
update says. Memory is that of four copies of the tensor, whatever the number of updates.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.submodels.coverage import Coverage


class Spread:
    """Values of one buffer, elementwise; what is NaN in `base` has not been measured and says nothing."""

    def __init__(self, base: np.ndarray) -> None:
        self._smallest = np.full(base.shape, np.inf)
        self._second_smallest = np.full(base.shape, np.inf)
        self._largest = np.full(base.shape, -np.inf)
        self._second_largest = np.full(base.shape, -np.inf)
        self.add(base)

    def add(self, values: np.ndarray, coverage: Coverage | None = None) -> None:
        """Note what an update says; `values` has the coverage's `value_shape`, None covers all."""
        given = np.full(self._smallest.shape, np.nan)
        if coverage is None or coverage.mask is None:
            given[... if coverage is None else coverage.index] = values
        else:
            given[coverage.index] = _scattered(values, coverage.mask)
        low = np.where(np.isnan(given), np.inf, given)
        high = np.where(np.isnan(given), -np.inf, given)
        np.minimum(self._second_smallest, np.maximum(self._smallest, low), out=self._second_smallest)
        np.minimum(self._smallest, low, out=self._smallest)
        np.maximum(self._second_largest, np.minimum(self._largest, high), out=self._second_largest)
        np.maximum(self._largest, high, out=self._largest)

    def clipped(self, values: np.ndarray, coverage: Coverage | None = None) -> np.ndarray:
        """Return the values, each as near as it may be; of one or two values both may stay."""
        least = np.minimum(self._second_smallest, self._second_largest)
        most = np.maximum(self._second_smallest, self._second_largest)
        if coverage is not None:
            least, most = coverage.take(least), coverage.take(most)
        clipped: np.ndarray = np.clip(values.astype(np.float64), least, most)
        return clipped


def _scattered(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scattered = np.full(mask.shape, np.nan)
    scattered[mask] = values
    return scattered

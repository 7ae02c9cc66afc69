"""An aggregation rule (`--aggregation midrange`) and a server optimizer (`--server-optimizer signsgd`)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Midrange:
    """The middle between the smallest and the largest value of each coordinate, `trim` of each end left out."""

    trim: int = 0
    least: ClassVar[int] = 1

    def combine(self, updates: np.ndarray) -> np.ndarray:
        ordered = np.sort(updates, axis=0)  # NaN, of an update without this coordinate, sorts last
        counts = np.sum(~np.isnan(updates), axis=0)
        trim = np.minimum(self.trim, np.maximum(counts - 1, 0) // 2)
        columns = np.arange(updates.shape[1])
        low, high = ordered[trim, columns], ordered[np.maximum(counts - 1 - trim, 0), columns]
        return (low + high) / 2


@dataclass(frozen=True)
class SignSgd:
    """w + lr * sign(delta), without any state (arXiv 1802.04434)."""

    learning_rate: float = 0.01
    state_count: ClassVar[int] = 0

    def step(self, weights, delta, state):
        return weights + self.learning_rate * np.sign(delta), ()

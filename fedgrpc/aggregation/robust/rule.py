"""Interface of an aggregation rule, of one of two kinds.

    coordinate rule   looks at one coordinate of all updates at a time, whoever covers it
    distance rule     gives every update a share, from the distances between whole updates

A distance rule needs no update in memory: the products of all pairs (the Gram matrix) have every distance, and
its result is a sum of updates with the shares as factors. So updates are read twice, a piece at a time: for the
products, and for the sum.

The rule: devices count, not examples. A count is a claim, and a rule that weighed by it could be bought.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np


class CoordinateRule(Protocol):
    """A frozen dataclass, whose fields are its options. `least` updates are needed."""

    least: ClassVar[int]

    def combine(self, updates: np.ndarray) -> np.ndarray:
        """Return one value for each column of `updates` [n, m] float64; NaN: an update that does not cover it.

        A column without any value gives NaN.
        """
        ...


class DistanceRule(Protocol):
    """A frozen dataclass, whose fields are its options. `least` updates are needed."""

    @property
    def least(self) -> int: ...

    def shares(self, gram: np.ndarray) -> np.ndarray:
        """Return the factor of each update in the result [n], from 0, of the products of all pairs [n, n].

        The factors sum to 1, or to less where the rule clips.
        """
        ...


Rule = CoordinateRule | DistanceRule


def squared_distances(gram: np.ndarray) -> np.ndarray:
    """Return the squared distance of each pair [n, n], from 0."""
    squares = np.diagonal(gram)
    between: np.ndarray = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(between, 0.0)
    return between


def distances_to(gram: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the distance [n] of each update to the sum of all with these factors."""
    product = gram @ shares
    squared = np.diagonal(gram) - 2 * product + float(shares @ product)
    distances: np.ndarray = np.sqrt(np.maximum(squared, 0.0))
    return distances

"""Reduction: the pruning and clustering of a plan, done where the model is sent instead of where it is trained.

The rule: what the aggregator leaves out of a version is what the device would leave out of it, by the same rule.
So a device gets only the weights that it keeps, and its own pruning and clustering find nothing more to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedgrpc.submodels.plan import Clustering, LocalModelPlan, Pruning, matches

_ITERATIONS = 50


@dataclass(frozen=True)
class Reduction:
    """Pruning and clustering of a plan; without either it reduces nothing."""

    pruning: Pruning | None = None
    clustering: Clustering | None = None

    @classmethod
    def of(cls, plan: LocalModelPlan) -> Reduction:
        """Return the part of a plan that makes a payload smaller."""
        return cls(plan.pruning, plan.clustering)

    @property
    def nothing(self) -> bool:
        """True if the model stays as it is."""
        return self.pruning is None and self.clustering is None

    def of_tensor(self, name: str, axes: int) -> Reduction:
        """Return what is done to that tensor, as if it were the only one."""
        pruning = replace(self.pruning, layers=("*",), scope="layer") if self.pruning else None
        clustering = replace(self.clustering, layers=("*",)) if self.clustering else None
        prunes, clusters = self.prunes(name, axes), self.clusters(name, axes)
        return Reduction(pruning if prunes else None, clustering if clusters else None)

    def prunes(self, name: str, axes: int) -> bool:
        """Return whether weights of that tensor are left out: of float parameters with two axes or more."""
        return self.pruning is not None and axes >= 2 and matches(name, self.pruning.layers)

    def clusters(self, name: str, axes: int) -> bool:
        """Return whether that tensor gets few different values: of float parameters with two axes or more."""
        return self.clustering is not None and axes >= 2 and matches(name, self.clustering.layers)


class ReducedTensors(Mapping[str, np.ndarray]):
    """Tensors by name, each reduced when it is asked for; `parameters` names those that may be."""

    def __init__(
        self, tensors: Mapping[str, np.ndarray], reduction: Reduction, parameters: Collection[str]
    ) -> None:
        self._tensors = tensors
        self._reduction = reduction
        self._parameters = parameters
        self._least: float | None = None
        if reduction.pruning is not None and reduction.pruning.scope == "global":
            self._least = self._global_bound(reduction.pruning)

    def _global_bound(self, pruning: Pruning) -> float | None:
        magnitudes = [
            np.abs(self._tensors[name]).reshape(-1)
            for name in self._parameters
            if self._reduction.prunes(name, self._tensors[name].ndim)
        ]
        if not magnitudes:
            return None
        together = np.concatenate(magnitudes)
        count = max(1, round((1 - pruning.ratio) * together.size))
        return float(np.partition(together, together.size - count)[together.size - count])

    def __getitem__(self, name: str) -> np.ndarray:
        values = self._tensors[name]
        if name not in self._parameters:
            return values
        mask = self._mask(name, values)
        if mask is not None:
            values = np.where(mask, values, 0).astype(values.dtype)
        if self._reduction.clusters(name, values.ndim):
            assert self._reduction.clustering is not None
            values = clustered(values, self._reduction.clustering.clusters, mask)
        return values

    def _mask(self, name: str, values: np.ndarray) -> np.ndarray | None:
        pruning = self._reduction.pruning
        if pruning is None or not self._reduction.prunes(name, values.ndim):
            return None
        magnitudes = np.abs(values)
        if self._least is None:
            return largest(magnitudes, 1 - pruning.ratio)
        kept: np.ndarray = magnitudes >= self._least
        return kept if kept.any() else largest(magnitudes, 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def largest(magnitudes: np.ndarray, fraction: float) -> np.ndarray:
    """Mark exactly the `fraction` of the elements that are largest, at least one; of equal ones the first."""
    flat = magnitudes.reshape(-1)
    count = max(1, round(fraction * flat.size))
    least = np.partition(flat, flat.size - count)[flat.size - count]
    kept = flat > least
    kept[np.flatnonzero(flat == least)[: count - int(kept.sum())]] = True
    marked: np.ndarray = kept.reshape(magnitudes.shape)
    return marked


def clustered(values: np.ndarray, count: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Replace the values that `mask` keeps by `count` centroids at most: k-means from evenly spaced ones.

    Lloyd's algorithm on sorted values, where each cluster is an interval. Other values become 0. Values that are
    few already stay.
    """
    elements = values.reshape(-1).astype(np.float64)
    ordered = np.sort(elements if mask is None else elements[mask.reshape(-1)])
    different = np.unique(ordered)
    if different.size <= count:
        centroids = different
    else:
        centroids = _centroids(ordered, count)
    members = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, elements, side="left")
    found = centroids.astype(values.dtype)[members].reshape(values.shape)
    return found if mask is None else np.where(mask, found, 0).astype(values.dtype)


def _centroids(ordered: np.ndarray, count: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], count)
    for _ in range(_ITERATIONS):
        bounds = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], bounds, [ordered.size]])
        sizes = np.diff(edges)
        filled = sizes > 0
        moved = (sums[edges[1:]] - sums[edges[:-1]])[filled] / sizes[filled]
        if moved.shape == centroids.shape and np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids

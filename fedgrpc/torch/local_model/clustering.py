"""Weight sharing: k-means leaves each layer a few different weights (Deep Compression, arXiv 1510.00149)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ITERATIONS = 50


@dataclass(frozen=True, eq=False)
class Clusters:
    """Increasing centroids [K], and the number of each element's centroid (int64, in the tensor's shape)."""

    centroids: Tensor
    members: Tensor

    @property
    def values(self) -> Tensor:
        """The clustered tensor."""
        return self.centroids[self.members]

    def projected(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Replace the elements of each cluster by their mean: the orthogonal projection onto clustered tensors.

        A projected gradient is the centroids' gradient, divided by the number of members, so that a learning rate
        means what it means without clusters. Elements that `mask` leaves out belong to no cluster and become 0.
        """
        members, flat = self.members.reshape(-1), values.reshape(-1)
        ones = torch.ones_like(flat) if mask is None else mask.reshape(-1).to(flat.dtype)
        zeros = torch.zeros(len(self.centroids), dtype=flat.dtype, device=flat.device)
        counts = zeros.index_add(0, members, ones)
        means = zeros.index_add(0, members, flat * ones) / counts.clamp(min=1)
        return (means[members] * ones).reshape(values.shape)

    def equalized(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Make the members of each cluster, which differ in their last bit at most, exactly equal."""
        members, flat = self.members.reshape(-1), values.reshape(-1)
        largest = torch.full_like(flat[:1], -torch.inf).repeat(len(self.centroids))
        kept = flat if mask is None else torch.where(mask.reshape(-1), flat, -torch.inf)
        equal = largest.scatter_reduce(0, members, kept, "amax")[members].reshape(values.shape)
        return equal if mask is None else torch.where(mask, equal, torch.zeros_like(values))


def cluster(values: Tensor, count: int, mask: Tensor | None = None) -> Clusters:
    """Cluster the elements that `mask` keeps by k-means, from centroids evenly spaced over their range.

    Lloyd's algorithm on sorted values, where each cluster is an interval, so an iteration costs O(K log n).
    Centroids without any element are left out, so the result may have fewer.
    """
    elements = values.detach().reshape(-1).double()
    kept = elements if mask is None else elements[mask.reshape(-1)]
    ordered = kept.sort().values
    different = torch.unique_consecutive(ordered)
    if len(different) <= count:
        # They were clustered where the model was sent.
        members = torch.bucketize(elements, (different[1:] + different[:-1]) / 2)
        return Clusters(different.to(values.dtype), members.reshape(values.shape))
    sums = torch.cat([torch.zeros(1, dtype=torch.float64, device=kept.device), ordered.cumsum(0)])
    centroids = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64).to(kept.device)
    for _ in range(_ITERATIONS):
        bounds = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        edges = torch.cat([bounds.new_zeros(1), bounds, bounds.new_full((1,), len(ordered))])
        sizes = edges.diff()
        filled = sizes > 0
        moved = (sums[edges[1:]] - sums[edges[:-1]])[filled] / sizes[filled]
        if moved.shape == centroids.shape and torch.equal(moved, centroids):
            break
        centroids = moved
    members = torch.bucketize(elements, (centroids[1:] + centroids[:-1]) / 2)
    return Clusters(centroids.to(values.dtype), members.reshape(values.shape))

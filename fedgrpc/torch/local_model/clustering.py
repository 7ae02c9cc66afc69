"""Weight sharing: each layer has a few different weights, by k-means (Deep Compression, arXiv 1510.00149)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ITERATIONS = 50


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centroids [K], increasing, and which one each element of the tensor has (int64, the tensor's shape)."""

    centroids: Tensor
    members: Tensor

    @property
    def values(self) -> Tensor:
        """The clustered tensor."""
        return self.centroids[self.members]

    def projected(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """The nearest tensor to `values` whose elements are equal within each cluster: their means.

        It is the orthogonal projection onto clustered tensors. Of a gradient it is the centroids' gradient,
        divided by the members' number, so that a learning rate means what it means without clusters. Elements
        that `mask` leaves out belong to no cluster and become 0.
        """
        members, flat = self.members.reshape(-1), values.reshape(-1)
        ones = torch.ones_like(flat) if mask is None else mask.reshape(-1).to(flat.dtype)
        zeros = torch.zeros(len(self.centroids), dtype=flat.dtype, device=flat.device)
        counts = zeros.index_add(0, members, ones)
        means = zeros.index_add(0, members, flat * ones) / counts.clamp(min=1)
        return (means[members] * ones).reshape(values.shape)

    def equalized(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """`values`, of which members of a cluster differ in their last bit at most, with no difference left."""
        members, flat = self.members.reshape(-1), values.reshape(-1)
        largest = torch.full_like(flat[:1], -torch.inf).repeat(len(self.centroids))
        kept = flat if mask is None else torch.where(mask.reshape(-1), flat, -torch.inf)
        equal = largest.scatter_reduce(0, members, kept, "amax")[members].reshape(values.shape)
        return equal if mask is None else torch.where(mask, equal, torch.zeros_like(values))


def cluster(values: Tensor, count: int, mask: Tensor | None = None) -> Clusters:
    """k-means of the elements (of those that `mask` keeps), from centroids evenly spaced over their range.

    Lloyd's algorithm on sorted values, where each cluster is a stretch: an iteration costs O(K log n). Centroids
    that no element is nearest to are left out, so there may be fewer.
    """
    elements = values.detach().reshape(-1).double()
    kept = elements if mask is None else elements[mask.reshape(-1)]
    ordered = kept.sort().values
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

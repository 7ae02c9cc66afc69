"""Input of a commit: one `Merge`, the updates that a round has accepted and how each counts.

The rule: it is a value, computed once (`fedgrpc.runs.weighing`). A commit reads nothing else of the round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from fedgrpc.aggregation.robust.aggregation import Combine
from fedgrpc.submodels.channels import KeptChannels

_NOTHING: Mapping[str, float] = MappingProxyType({})
_NONE_MIXED: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Scores:
    """Mean of the workers' scores by examples, over how many examples, and whether each is of a sub-model.

    `not_finite`: names of those that are NaN or infinite on some worker, as many as one report may have.
    """

    metrics: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    example_count: int = 0
    of_sub_models: bool = False
    not_finite: tuple[str, ...] = ()


def keeps_nothing(token: str, name: str) -> bool:
    """Return False: the worker sends all it has trained."""
    return False


@dataclass(frozen=True)
class Merge:
    """The updates of one commit, by token in slot order, and how each counts in the mean.

    `scales` are factors on the differences of an update; without: 1. `sub_models` has the partial updates and the
    channels of each (None: all), `merged` those that are means themselves, and what such an update says that it
    weighs. `keeps(token, name)`: its worker keeps that tensor to itself. `clips_buffers`: no update alone takes a
    buffer beyond what others say. `scores` are those of the round's base version, `training_metrics` means of what
    workers say of their training. `accumulated_steps`: what the steps of an update amount to in the mean; 0 where
    steps are not normalized. `workers`: of how many devices the updates are. `distances` of updates to their
    geometric median, where a rule has looked. `combine`: the rule for coordinates, in place of the mean. `means`:
    of the trained tensors, float64, where a secure sum gave them and no update says anything by itself; `summed`
    is then the weight of all, in examples. `mixed`: models of workers are mixed in by their scales, each the
    difference of an update to this version.
    """

    weights: Mapping[str, float]
    scales: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    sub_models: Mapping[str, KeptChannels | None] = field(default_factory=dict)
    merged: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    keeps: Callable[[str, str], bool] = keeps_nothing
    clips_buffers: bool = False
    scores: Scores = field(default_factory=Scores)
    training_metrics: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    accumulated_steps: float = 0.0
    workers: int = 1
    distances: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    combine: Combine | None = None
    means: Mapping[str, np.ndarray] | None = None
    summed: float | None = None
    mixed: Mapping[str, int] = field(default_factory=lambda: _NONE_MIXED)

    @property
    def alike(self) -> bool:
        """True if every update is a worker's own, of the whole model, and they are averaged."""
        return not (self.sub_models or self.merged or self.combine or self.means is not None)

    def voted(self, tokens: Collection[str], combine: Combine) -> Merge:
        """Return the same with `combine` in place of the mean, and one vote for each of `tokens`."""
        weights = {token: float(token in tokens) for token in self.weights}
        return replace(self, weights=weights, clips_buffers=True, combine=combine)

    def shared_out(self, shares: Mapping[str, float]) -> Merge:
        """Return the same with each update's factor in the sum; others get none. Shares sum to 1, or to less."""
        total = math.fsum(shares.values())
        weights = {token: shares.get(token, 0.0) / total for token in self.weights}
        scales = {token: self.scales.get(token, 1.0) * total for token in self.weights}
        return replace(self, weights=weights, scales=scales, clips_buffers=True)

    def lacks(self, token: str, name: str) -> bool:
        """Return whether the worker has no such tensor in its sub-model, or keeps it to itself."""
        kept = self.sub_models.get(token)
        return self.keeps(token, name) or (kept is not None and not kept.has(name))

    @property
    def weight(self) -> float:
        """Weight of the mean itself: that of all updates together."""
        return sum(self.weights.values()) if self.summed is None else self.summed

    @property
    def factors(self) -> dict[str, float]:
        """Factor on the differences of each update, before the sum is divided by all weights."""
        # The divisor has no scales: a scaled update counts for less, and makes no other count for more.
        return {token: weight * self.scales.get(token, 1.0) for token, weight in self.weights.items()}

    def share(self, token: str) -> float:
        """Return the share of an update in the mean."""
        return self.factors[token] / math.fsum(self.weights.values())

"""The operator's aggregation (`--aggregation`): a rule by name, perhaps with nearest-neighbour mixing before it.

    mean   median   trimmed-mean:0.2   geometric-median   krum:f=2   multi-krum:f=2   centered-clip
    nnm+trimmed-mean:0.2        nnm:f=2+median        package.module:Class

A class of one's own has the methods of `CoordinateRule` or `DistanceRule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from fedgrpc.aggregation.robust.centered_clip import CenteredClip
from fedgrpc.aggregation.robust.coordinate import Median, TrimmedMean
from fedgrpc.aggregation.robust.geometric_median import GeometricMedian
from fedgrpc.aggregation.robust.krum import Krum, MultiKrum
from fedgrpc.aggregation.robust.nnm import mixing
from fedgrpc.aggregation.robust.rule import Rule, distances_to
from fedgrpc.errors import UsageError
from fedgrpc.plugins import make

RULES: Final[dict[str, type]] = {
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "geometric-median": GeometricMedian,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "centered-clip": CenteredClip,
}
MEAN: Final = "mean"
_MIXED: Final = "nnm"
# Without f, mixing supposes that so many of the updates may be meant to do harm.
_USUAL_SHARE: Final = 0.2

Combine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RuleOutcome:
    """Outcome of a rule for one round: the factor of each update (`shares`), or how coordinates are combined.

    `distances` of each update to the geometric median of all, to show who is odd.
    """

    distances: np.ndarray
    shares: np.ndarray | None = None
    combine: Combine | None = None


@dataclass(frozen=True)
class _Mixing:
    """Options of nearest-neighbour mixing: up to `f` attackers; None: a fifth of the updates."""

    f: int | None = None


@dataclass(frozen=True)
class Aggregation:
    """A rule, and the mixing before it (None: none)."""

    rule: Any
    mixed: _Mixing | None = None

    @property
    def by_coordinate(self) -> bool:
        """True if the rule looks at coordinates, so that partial updates can be combined."""
        return hasattr(self.rule, "combine") and self.mixed is None

    @property
    def least(self) -> int:
        """Fewest updates of a round."""
        return int(self.rule.least)

    def judge(self, gram: np.ndarray) -> RuleOutcome:
        """Return the verdict on updates from the products of all pairs [n, n]."""
        distances = distances_to(gram, GeometricMedian().shares(gram))
        matrix = None if self.mixed is None else mixing(gram, self._attackers(len(gram)))
        if hasattr(self.rule, "combine"):
            return RuleOutcome(distances, combine=_after(matrix, self.rule.combine))
        shares = self.rule.shares(gram if matrix is None else matrix @ gram @ matrix.T)
        return RuleOutcome(distances, shares if matrix is None else matrix.T @ shares)

    def _attackers(self, count: int) -> int:
        assert self.mixed is not None
        own = getattr(self.rule, "f", None) if self.mixed.f is None else self.mixed.f
        return int(_USUAL_SHARE * count) if own is None else int(own)


def _after(matrix: np.ndarray | None, combine: Combine) -> Combine:
    return combine if matrix is None else lambda updates: combine(matrix @ updates)


@lru_cache(maxsize=64)
def aggregation_of(text: str) -> Aggregation | None:
    """Return the aggregation of a text; None is the weighted mean. Raises `UsageError`."""
    if text == MEAN:
        return None
    before, found, after = text.partition("+")
    mixed: _Mixing | None = None
    if found:
        mixed = make("aggregation", before, {_MIXED: _Mixing})
        if not isinstance(mixed, _Mixing):
            raise UsageError(f"only nnm goes before a rule, not {before!r}")
    rule: Rule = make("aggregation", after if found else text, RULES)
    if not (hasattr(rule, "combine") or hasattr(rule, "shares")) or not hasattr(rule, "least"):
        raise UsageError(f"aggregation {text}: the class has no combine() or shares(), or no `least`")
    return Aggregation(rule, mixed)


def own_rules(text: str) -> str:
    """Return the `package.module:Class` that a text names; "" where all rules are of this package."""
    before, found, after = text.partition("+")
    named = [(before, (_MIXED,)), (after, RULES)] if found else [(text, (MEAN, *RULES))]
    return " ".join(part for part, known in named if part.partition(":")[0] not in known)

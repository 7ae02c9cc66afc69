"""A committed version of the model: what is known of it, whether it jumped, and which version is the best. Pure.

A version without a score is not the best while another one has a score, and one that jumped is never the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

# A round leaves the norm of a trained model about as it was. Growth by this factor is a jump.
_LARGER = 10.0
# A score this many times worse than the best one is a jump.
_WORSE = 2.0
_NOTHING: Mapping[str, float] = MappingProxyType({})


class Jump(Enum):
    """Quantity that is far off in a version, compared with all versions before it."""

    NONE = 0
    NORM = 1
    SCORES = 2


@dataclass(frozen=True)
class Version:
    """A committed model version. `sha256` is that of its file; b"": it holds no model yet, so ask for one.

    `trained` rounds lead to it from the first model, whose content has the digest `first_model`. It is a copy of
    version `rolled_back_to`, if that is not 0.
    """

    version: int
    round: int
    sha256: bytes
    trained: int = 0
    norm: float = 0.0
    jump: Jump = Jump.NONE
    rolled_back_to: int = 0
    first_model: bytes = b""
    metrics: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    evaluator_metrics: Mapping[str, float] = field(default_factory=lambda: _NOTHING)

    @property
    def scores(self) -> Mapping[str, float]:
        """All scores of the version. Those of evaluators replace those of workers."""
        return {**self.metrics, **self.evaluator_metrics}


@dataclass(frozen=True)
class Measure:
    """The score by which versions are compared, and whether more of it is better."""

    name: str
    higher: bool


ACCURACY, LOSS = Measure("accuracy", True), Measure("loss", False)


@dataclass(frozen=True)
class Candidate:
    """A version that may be the best one, its scores, and whether it jumped."""

    version: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    jump: Jump = Jump.NONE


def best_of(candidates: Sequence[Candidate], measures: Sequence[Measure] = (ACCURACY, LOSS)) -> int | None:
    """Return the version with the best score by the first of `measures` that any version has.

    Without scores, and among equally good versions, return the last; None if all have jumped.
    """
    good = sorted((each for each in candidates if each.jump is not Jump.NORM), key=lambda each: each.version)
    for measure in measures:
        scored = [each for each in good if measure.name in each.metrics]
        if scored:
            sign = 1 if measure.higher else -1
            return max(scored, key=lambda each: (sign * each.metrics[measure.name], each.version)).version
    return good[-1].version if good else None


def norm_jumps(norm: float, largest_norm: float, elements: int) -> bool:
    """Return whether a model's L2 norm is far above that of every version before it that did not jump."""
    if not largest_norm > 0:
        return False
    # An untrained model may start near zero: below an average of 1 for each element, growth is no jump.
    return not norm <= _LARGER * max(largest_norm, math.sqrt(elements))


def score_jumps(measure: Measure, value: float, best: float) -> bool:
    """Return whether a score is far worse than the best one. Scores that can be negative have no such scale."""
    if not best > 0:
        return False
    return value < best / _WORSE if measure.higher else value > best * _WORSE

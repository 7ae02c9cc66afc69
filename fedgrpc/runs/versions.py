"""Knowledge about the versions that are kept: their scores, their norms, and the best of them.

The rule: the best version that has not jumped is never let go, however many bad ones come after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from fedgrpc.rounds.version import (
    ACCURACY,
    LOSS,
    Candidate,
    Jump,
    Measure,
    Version,
    best_of,
    norm_jumps,
    score_jumps,
)


class Versions:
    """The versions that are kept, by number."""

    def __init__(self, measures: Sequence[Measure] = (), evaluators_named: bool = False) -> None:
        """The best is the one with the best score by the first of `measures`, or else accuracy, or else loss."""
        self._measures = (*measures, ACCURACY, LOSS)
        self._evaluators_named = evaluators_named
        self._kept: dict[int, Version] = {}

    def copy(self) -> Versions:
        """Return a copy that changes on its own."""
        copied = Versions((), self._evaluators_named)
        copied._measures, copied._kept = self._measures, dict(self._kept)
        return copied

    def __contains__(self, version: object) -> bool:
        return version in self._kept

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._kept))

    def get(self, version: int) -> Version | None:
        """Return the knowledge about a version; None: it is not kept."""
        return self._kept.get(version)

    def add(self, version: Version) -> None:
        """Keep what is known of a version."""
        self._kept[version.version] = version

    def keep_only(self, numbers: Collection[int]) -> None:
        """Forget all versions but these."""
        self._kept = {number: version for number, version in self._kept.items() if number in numbers}

    @property
    def last(self) -> Version | None:
        """The newest one."""
        return self._kept[max(self._kept)] if self._kept else None

    @property
    def best(self) -> Version | None:
        """The version that is never let go; None where each has jumped."""
        number = best_of(self._candidates(), self._measures)
        return None if number is None else self._kept[number]

    def _candidates(self) -> list[Candidate]:
        """Scores of evaluators that the operator named come before those of workers; the two are not mixed."""
        there = [version for version in self._kept.values() if version.sha256]
        by_evaluators = self._evaluators_named and any(version.evaluator_metrics for version in there)
        return [
            Candidate(each.version, each.evaluator_metrics if by_evaluators else each.metrics, each.jump)
            for each in there
        ]

    def norm_jump(self, norm: float, elements: int) -> Jump:
        """Return whether a new version is far larger than all that are kept and have not jumped."""
        norms = (each.norm for each in self._kept.values() if each.jump is not Jump.NORM)
        return Jump.NORM if norm_jumps(norm, max(norms, default=0.0), elements) else Jump.NONE

    def score_jumps(self, version: int, scores: Mapping[str, float]) -> bool:
        """Return whether new scores of a version are far worse than those of the best one."""
        best = self.best
        if best is None or best.version == version or version not in self._kept:
            return False
        for measure in self._measures:
            if measure.name in scores and measure.name in best.scores:
                return score_jumps(measure, scores[measure.name], best.scores[measure.name])
        return False

"""Rules that the operator sets for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.version import Measure


@dataclass(frozen=True)
class RunRules:
    """Rules of a run: `rounds` of training by `policy`. With `evaluate`, its versions are scored.

    Without `rounds` the run is continuous: it has no last round, and its rounds wait for new examples on devices.
    The best version is the one with the best score by the first of `measures`. Scores of evaluators count for it
    only where the operator named these. `initialises`: who may give the first model. `secure`: updates of training
    go into secure sums, and only workers with one-time keys are asked for one.
    """

    policy: RoundPolicy
    rounds: int | None
    evaluate: bool = False
    measures: tuple[Measure, ...] = ()
    evaluators_named: bool = False
    initialises: Callable[[str], bool] = lambda worker: True
    secure: bool = False

    @property
    def min_new_examples(self) -> int:
        """Number of new examples that a worker needs to take part in a round of training; 0: it needs none."""
        if self.policy.min_new_examples is not None:
            return self.policy.min_new_examples
        return 1 if self.rounds is None else 0

    def enough(self, trained: int) -> bool:
        """Return whether so many rounds of training are all that the run wants."""
        return self.rounds is not None and trained >= self.rounds

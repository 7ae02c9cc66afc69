"""Rules that the operator sets for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.version import Measure


@dataclass(frozen=True)
class RunRules:
    """Rules of a run: `rounds` of training by `policy`. With `evaluate`, its versions are scored.

    The best version is the one with the best score by the first of `measures`. Scores of evaluators count for it
    only where the operator named these. `initialises`: who may give the first model.
    """

    policy: RoundPolicy
    rounds: int
    evaluate: bool = False
    measures: tuple[Measure, ...] = ()
    evaluators_named: bool = False
    initialises: Callable[[str], bool] = lambda worker: True

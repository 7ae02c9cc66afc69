"""Which rules choose the workers of a round and its deadline. Pure: histories and an rng in, choices out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.rounds.deadline import DeadlineRule, learned_deadline
from fedgrpc.rounds.events import Deadline
from fedgrpc.rounds.history import Histories
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.selection import Choice, OortRule, choose_oort, choose_uniform


@dataclass(frozen=True)
class Choosing:
    """Settings of choosing.

    `selection`: by lot, or by expected usefulness and speed (Oort, arXiv 2010.06081). There `fairness` is the part
    of the seats for those who have waited longest, and `exploration` the part of the others that is for workers
    never tried, in the first round. `learn_deadline`: the deadline is the one that the wanted updates are expected
    to meet, by the `deadline_quantile` of each worker's own times, times `deadline_margin`.
    """

    selection: Literal["uniform", "oort"] = "uniform"
    fairness: float = 0.1
    exploration: float = 0.9
    learn_deadline: bool = False
    deadline_quantile: float = 0.9
    deadline_margin: float = 1.2

    def __post_init__(self) -> None:
        if self.selection not in ("uniform", "oort"):
            raise UsageError(f"selection must be 'uniform' or 'oort', not {self.selection!r}")
        if not 0 < self.deadline_quantile <= 1:
            raise UsageError(f"deadline_quantile must be above 0 and at most 1, not {self.deadline_quantile:g}")
        if not 1 <= self.deadline_margin < math.inf:
            raise UsageError(f"deadline_margin must be a number from 1, not {self.deadline_margin:g}")
        self._oort()

    def _oort(self) -> OortRule:
        floor = min(OortRule.exploration_floor, self.exploration)
        return OortRule(fairness=self.fairness, exploration=self.exploration, exploration_floor=floor)

    def choose(
        self, round_: Round, idle: tuple[str, ...], count: int, histories: Histories, rng: np.random.Generator
    ) -> tuple[tuple[Choice, ...], Deadline | None]:
        """Up to `count` of `idle`, each with its reason, and the deadline if these open the round.

        None: the policy's, which is also that of a buffer, since nobody waits for its slowest.
        """
        if self.selection == "oort":
            choices = choose_oort(idle, count, histories, round_.number, rng, self._oort())
        else:
            choices = choose_uniform(idle, count, rng)
        opens = round_.phase is RoundPhase.SELECTING and round_.policy.buffer_size is None
        if not (self.learn_deadline and opens):
            return choices, None
        workers = [choice.worker for choice in choices]
        rule = DeadlineRule(self.deadline_quantile, self.deadline_margin)
        return choices, learned_deadline(workers, round_.aim, histories, rule)

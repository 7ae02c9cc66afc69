"""Whom a simulated aggregator chooses, and what it remembers of them: the production rules on histories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fedgrpc.rounds.events import Selected, TaskPhase
from fedgrpc.rounds.history import Timing, WorkerHistory, timing_of
from fedgrpc.rounds.round import Round
from fedgrpc.rounds.selection import choose_oort, choose_uniform, learned_deadline

if TYPE_CHECKING:
    from tests.simulator.world import World


class Chooser:
    """The histories of one incarnation's workers; they die with it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._histories: dict[str, WorkerHistory] = {}

    def choose(self, round_: Round, idle: Iterable[str], count: int) -> Selected:
        """Up to `count` of `idle`, each with a new token; a deadline where the world's habits learn one."""
        rng = np.random.default_rng(self._world.rng.integers(1 << 32))
        idle, habits = tuple(idle), self._world.choosing
        if habits.oort:
            choices = choose_oort(idle, count, self._histories, round_.number, rng)
        else:
            choices = choose_uniform(idle, count, rng)
        workers = [choice.worker for choice in choices]
        for worker in workers:
            self._histories[worker] = self._of(worker).chosen(round_.number)
        deadline = None
        if habits.learned_deadline:
            deadline = learned_deadline(workers, round_.aim, self._histories)
        reasons = {choice.worker: choice.reason for choice in choices}
        return Selected(tuple((self._world.new_token(), worker) for worker in workers), reasons, deadline)

    def remember(self, round_: Round) -> None:
        """What a round that has ended has told of its workers."""
        for token, task in round_.tasks.items():
            history = self._of(task.worker)
            timing = timing_of(round_.carried.get(token, task))
            if task.phase is TaskPhase.ACCEPTED:
                history = history.reported(timing or Timing(), loss=float(len(token)), example_count=100)
            elif timing is not None:
                history = history.timed(timing)
            self._histories[task.worker] = history

    def _of(self, worker: str) -> WorkerHistory:
        return self._histories.get(worker, WorkerHistory())

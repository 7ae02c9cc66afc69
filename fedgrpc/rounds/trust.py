"""Which workers a round may count on: those that do not keep it waiting again and again.

The rule: a worker that held up two rounds in a row, and delivered in neither, is chosen only where the others are
too few, for a time that doubles with each further round. One delivery makes up for all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.reporting import enough
from fedgrpc.rounds.round import Round
from fedgrpc.rounds.task import Task

_PATIENCE = 2
_MOST_DOUBLINGS = 8
_LONGEST_S = 24 * 3600.0


@dataclass(frozen=True)
class Trust:
    """How many of its last rounds in a row a worker held up, and until when it is doubted for that, seconds."""

    held_up: int = 0
    doubted_until: float = 0.0

    def doubted(self, now: float) -> bool:
        """Whether others are to be chosen first."""
        return now < self.doubted_until

    def after(self, round_: Round, task: Task, now: float) -> Trust:
        """What a task of a round that has ended makes of it. A round that had enough was held up by nobody."""
        if task.phase is TaskPhase.ACCEPTED:
            return Trust()
        if task.phase not in (TaskPhase.LATE, TaskPhase.EXPIRED) or enough(round_):
            return self
        held_up = self.held_up + 1
        if held_up < _PATIENCE:
            return Trust(held_up)
        doublings = min(held_up - _PATIENCE + 1, _MOST_DOUBLINGS)
        return Trust(held_up, now + min(_LONGEST_S, round_.policy.deadline_s * 2**doublings))

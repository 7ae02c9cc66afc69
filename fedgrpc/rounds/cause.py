"""Why a round was abandoned, as a value, and when that has happened too often to go on. Pure decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedgrpc.rounds.events import Cause, TaskPhase
from fedgrpc.rounds.task import Task

# What has gone wrong so often in a row goes wrong again.
PATIENCE = 3
_AT_WORK = frozenset({TaskPhase.DOWNLOADING, TaskPhase.TRAINING, TaskPhase.UPLOADING})


def cause_of(tasks: Iterable[Task]) -> Cause:
    """Why too few of these tasks, as they stand when their round closes, have an update."""
    phases = {task.phase for task in tasks if not task.gone}
    if phases & {TaskPhase.FAILED, TaskPhase.REJECTED}:
        return Cause.FAILED
    return Cause.TOO_SLOW if phases & _AT_WORK else Cause.NO_WORKERS


@dataclass(frozen=True)
class Streak:
    """How many rounds in a row were abandoned for one cause; those that wanted workers are left out."""

    cause: Cause = Cause.NONE
    count: int = 0

    def after(self, cause: Cause) -> Streak:
        """One more round was abandoned."""
        if cause not in (Cause.FAILED, Cause.TOO_SLOW, Cause.UNUSABLE):
            return self
        return Streak(cause, self.count + 1 if cause is self.cause else 1)

    @property
    def hopeless(self) -> bool:
        """Whether another round would most likely end in the same way."""
        return self.count >= PATIENCE

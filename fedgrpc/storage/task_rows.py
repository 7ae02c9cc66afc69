"""Values of the database of a run: the run, a round that was left unfinished, and tasks as rows.

The rule: a row is checked when it is read, since a damaged one must not name a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fedgrpc.protocol.plans import local_task_to_proto
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.runs.events import EndReason, RunPhase
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.storage.database import Row
from fedgrpc.v1.round_pb2 import Round as RoundRecord

TASK_COLUMNS: Final = "token, round, slot, worker, phase, reason, staleness, chosen, local_model, loss_cause"
# Tokens name files: one that a damaged row gives must not name another folder's.
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class RunRow:
    """State of the run, and the reason why it has ended or paused itself; `started_at` is wall time, seconds."""

    id: str
    name: str
    phase: RunPhase
    end_reason: EndReason
    reason: str
    started_at: float
    paused_reason: str = ""


@dataclass(frozen=True)
class TaskRow:
    """A task as it is stored; `local_model` is a serialized `fedgrpc.v1.LocalModel`."""

    token: str
    round: int
    slot: int
    worker: str
    phase: TaskPhase
    reason: str
    staleness: int = 0
    chosen: str = ""
    local_model: bytes = b""
    loss_cause: LossCause = LossCause.NONE

    @classmethod
    def of_row(cls, row: Row) -> TaskRow:
        """Return the task of the columns in `TASK_COLUMNS`. Raises `ValueError` for a damaged row."""
        token, number, slot, worker, phase, reason, staleness, chosen, local_model, cause = row
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"a task has the token {token[:64]!r}")
        return cls(
            *(token, number, slot, worker, TaskPhase(phase)),
            *(reason, staleness, chosen, local_model, LossCause(cause)),
        )

    def columns(self) -> tuple[object, ...]:
        """Return the values of `TASK_COLUMNS`."""
        return (
            *(self.token, self.round, self.slot, self.worker, self.phase.value, self.reason, self.staleness),
            *(self.chosen, self.local_model, self.loss_cause.value),
        )


def rows_of(round_: RoundInProgress) -> list[TaskRow]:
    """Return the tasks of a round as they are stored."""
    return [
        TaskRow(
            token,
            round_.number,
            task.slot,
            task.worker,
            task.phase,
            task.reason,
            task.staleness,
            task.chosen,
            _local_bytes(round_.local_task(token)),
            task.loss_cause,
        )
        for token, task in round_.state.tasks.items()
    ]


def carried_rows(round_: RoundInProgress, now: float) -> list[TaskRow]:
    """Return what is stored of the tasks that go over from a round that has ended into the one after it."""
    after, _ = round_.following(round_.number + 1, round_.state.policy, round_.base_version, 0.0, now)
    return rows_of(after)


def _local_bytes(local: LocalTask) -> bytes:
    return b"" if local.plain else local_task_to_proto(local).SerializeToString()


@dataclass(frozen=True)
class StoredRound:
    """A round that a former process left unfinished; `deadline_at` is wall time, seconds."""

    record: RoundRecord
    aim: int
    deadline_at: float
    tasks: tuple[TaskRow, ...]

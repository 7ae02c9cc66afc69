"""What workers are answered: their tasks, and whether to go on."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import LocalTask


@dataclass(frozen=True)
class Assignment:
    """A task as its worker is told of it; `time_left_s` None: no deadline."""

    token: str
    worker: str
    round: int
    kind: TaskKind
    version: int
    seed: int
    time_left_s: float | None
    local: LocalTask = field(default_factory=LocalTask)


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat."""

    cancel: bool
    reason: str = ""
    time_left_s: float | None = None

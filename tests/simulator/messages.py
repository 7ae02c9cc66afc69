"""What workers and the aggregator say to each other: the protocol of aggregator.proto without its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from fedgrpc.rounds.events import TaskPhase


@dataclass(frozen=True)
class UpdateId:
    """One finished training: `serial` counts a worker's trainings, so a retrained task is another update."""

    worker: str
    serial: int


@dataclass(frozen=True)
class Poll:
    """Long poll for a task; answered by an `Assignment` or None."""

    worker: str


@dataclass(frozen=True)
class Heartbeat:
    """Answered by True when the task is to stop."""

    worker: str
    token: str
    phase: TaskPhase


@dataclass(frozen=True)
class Push:
    """Chunk number `offset` of `total`; answered by `Held`."""

    worker: str
    token: str
    update: UpdateId
    bad: bool
    offset: int
    total: int


@dataclass(frozen=True)
class Query:
    """Answered by `Held`."""

    worker: str
    token: str


@dataclass(frozen=True)
class GiveBack:
    """Answered by None."""

    worker: str
    token: str


Request = Poll | Heartbeat | Push | Query | GiveBack


@dataclass(frozen=True)
class Assignment:
    """A task as its worker is told of it."""

    token: str
    round: int
    version: int
    time_left_s: float | None


@dataclass(frozen=True)
class Held:
    """How many chunks of an update are held, and whether it is accepted."""

    chunks: int
    complete: bool

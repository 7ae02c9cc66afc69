"""What can happen to a round, and what the round then asks for. Values only; a token names a task.

Events come from outside (the aggregator or the simulator); effects go back to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class TaskPhase(Enum):
    """Where a task stands: `open` while its worker works on it, `final` once nothing can change it.

    An expired task is neither: its slot is free for another worker, yet news of it revives it.
    """

    OFFERED = 1
    DOWNLOADING = 2
    TRAINING = 3
    UPLOADING = 4
    ACCEPTED = 5
    REJECTED = 6
    FAILED = 7
    EXPIRED = 8
    LATE = 9

    @property
    def open(self) -> bool:
        return self.value <= TaskPhase.UPLOADING.value

    @property
    def final(self) -> bool:
        return not self.open and self is not TaskPhase.EXPIRED


@dataclass(frozen=True)
class Pool:
    """Who could take a task now (in no order), and how many workers are alive, busy ones included."""

    idle: tuple[str, ...]
    live_count: int


@dataclass(frozen=True)
class Selected:
    """The answer to `Select`: (token, worker) for each new task; may be fewer than asked, or none."""

    tasks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Progress:
    """The worker was heard of: the lease of its task starts anew."""

    token: str
    phase: TaskPhase
    fraction: float = 0.0


@dataclass(frozen=True)
class Accepted:
    """The update is received, verified and durable."""

    token: str


@dataclass(frozen=True)
class Rejected:
    """The update was received and refused."""

    token: str
    reason: str


@dataclass(frozen=True)
class Failed:
    """The worker gave the task back."""

    token: str
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Committed:
    """The new model version is durable."""

    version: int


@dataclass(frozen=True)
class Abort:
    """The round is to end without a result."""

    reason: str


Event = Pool | Selected | Progress | Accepted | Rejected | Failed | Tick | Committed | Abort


@dataclass(frozen=True)
class Select:
    """Choose up to `count` workers among the idle ones that are not in `exclude`; answer with `Selected`."""

    count: int
    exclude: frozenset[str]


@dataclass(frozen=True)
class Offer:
    """The task may be handed to its worker."""

    token: str
    worker: str


@dataclass(frozen=True)
class Cancel:
    """Nothing this task produces will be used any more."""

    token: str
    reason: str


@dataclass(frozen=True)
class Commit:
    """Compute the new model from the updates of these tasks; answer with `Committed` or `Abort`."""

    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """The round has reached a final phase."""

    committed: bool
    reason: str


Effect = Select | Offer | Cancel | Commit | Finished

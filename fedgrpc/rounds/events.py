"""Events of a round and its effects: what happens to it, and what it asks for. Values only; a token names a task.

Events come from the aggregator or a simulator. Effects go back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Final

_LAST_OPEN: Final = 4
_EXPIRED: Final = 8


class TaskPhase(Enum):
    """State of a task: `open` while its worker works on it, `final` once nothing can change it.

    An expired task is neither: its slot is free for another worker, yet an event of it revives it.
    """

    open: bool
    final: bool

    OFFERED = 1
    DOWNLOADING = 2
    TRAINING = 3
    UPLOADING = 4
    ACCEPTED = 5
    REJECTED = 6
    FAILED = 7
    EXPIRED = 8
    LATE = 9

    def __init__(self, number: int) -> None:
        # Attributes and no properties: each event of a task asks them of some thirty others.
        self.open = number <= _LAST_OPEN
        self.final = number > _LAST_OPEN and number != _EXPIRED


class LossCause(Enum):
    """Cause of the loss of a task. The numbers are those of `fedgrpc.v1.LossCause`, and stored."""

    # It is worked on, or its update was accepted.
    NONE = 0
    # Its worker never came for it.
    NO_SHOW = 1
    SLOW_DOWNLOAD = 2
    SLOW_TRAINING = 3
    SLOW_UPLOAD = 4
    # The update was refused.
    REFUSED = 5
    # The worker failed at it, has left or has forgotten it.
    GIVEN_BACK = 6
    # Its round ended without a result, or no further round takes the update.
    LATE = 7

    @property
    def label(self) -> str:
        """Return how a task with this cause ended, in a word or two for metrics and operators."""
        return _ENDINGS[self]


_ENDINGS = {
    LossCause.NONE: "accepted",
    LossCause.NO_SHOW: "no-show",
    LossCause.SLOW_DOWNLOAD: "slow download",
    LossCause.SLOW_TRAINING: "slow training",
    LossCause.SLOW_UPLOAD: "slow upload",
    LossCause.REFUSED: "rejected",
    LossCause.GIVEN_BACK: "failed",
    LossCause.LATE: "late",
}


class AbandonCause(Enum):
    """Reason why a round was abandoned."""

    NONE = 0
    # Too few workers came, or those that came went away.
    NO_WORKERS = 1
    # Workers gave their tasks back, or their updates were refused.
    FAILED = 2
    # Workers were still at work at the deadline.
    TOO_SLOW = 3
    # No version could be made of the updates.
    UNUSABLE = 4
    # An operator or the parent ended it.
    ORDERED = 5


@dataclass(frozen=True)
class WorkersAvailable:
    """The workers that could take a task now, in no order, and how many are alive, busy ones included."""

    idle: tuple[str, ...]
    live_count: int


@dataclass(frozen=True)
class Deadline:
    """Time that a round may take from its opening, and why so much."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class Selected:
    """The answer to `Select`: (token, worker) for each new task, which may be fewer than asked for, or none.

    `reasons` holds why a worker was chosen. `deadline` is used if this opens the round, within the policy's floor
    and ceiling; None: the policy's.
    """

    tasks: tuple[tuple[str, str], ...]
    reasons: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    deadline: Deadline | None = None


@dataclass(frozen=True)
class Progress:
    """The worker gave a sign of life: the lease of its task starts again.

    `bytes_held` of the `bytes_total` of its update have been received. Without them its pace is not judged.
    """

    token: str
    phase: TaskPhase
    fraction: float = 0.0
    bytes_held: int | None = None
    bytes_total: int | None = None


@dataclass(frozen=True)
class Accepted:
    """The update is received, verified and durable; `weight` is its weight in the mean."""

    token: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rejected:
    """The update was received and refused; `withdrawn`: even if it was accepted before."""

    token: str
    reason: str
    withdrawn: bool = False


@dataclass(frozen=True)
class Failed:
    """The worker gave the task back; `gone`: without trying, since it has left or forgotten the task."""

    token: str
    reason: str
    gone: bool = False


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Committed:
    """The new model version is durable."""

    version: int


@dataclass(frozen=True)
class Abort:
    """Someone ends the round without a result."""

    reason: str
    cause: AbandonCause = AbandonCause.ORDERED


TaskEvent = Progress | Accepted | Rejected | Failed
Event = WorkersAvailable | Selected | Progress | Accepted | Rejected | Failed | Tick | Committed | Abort


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
    """The task has lost its slot. A final one is over; an expired one is revived by its next event."""

    token: str
    reason: str
    cause: LossCause


@dataclass(frozen=True)
class CarryOver:
    """The task outlives the round: keep it for the next round, which `follow` opens.

    `cause` is why this round has no use for it; `NONE`: it is accepted.
    """

    token: str
    reason: str
    cause: LossCause = LossCause.NONE


@dataclass(frozen=True)
class Commit:
    """Compute the new model from the updates of these tasks; answer with `Committed` or `Abort`."""

    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """The round has reached a final phase."""

    committed: bool
    reason: str


Effect = Select | Offer | Cancel | CarryOver | Commit | Finished

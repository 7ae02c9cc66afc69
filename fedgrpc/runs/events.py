"""Events of a run beside those of its round, and effects that the run asks for. Values only.

Events come from the shell that owns the run (the aggregator or a simulator). Effects go back to it, together with
those of the round (`fedgrpc.rounds.events`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from fedgrpc.codec.layout import Layout
from fedgrpc.privacy.ledger import Ledger, PrivateRelease
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.privacy.secure_round import Ask, Parts, PassOn, SecurePhase, TellRoster
from fedgrpc.rounds import events as rounds
from fedgrpc.rounds.events import Selected
from fedgrpc.rounds.version import Version
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import DroppedTask, RoundInProgress
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.task_context import Report, TaskContext


class RunPhase(IntEnum):
    """Phase of a run; the last two are final. Numbered as on the wire."""

    RUNNING = 1
    PAUSED = 2
    FINISHED = 3
    STOPPED = 4

    @property
    def final(self) -> bool:
        return self in (RunPhase.FINISHED, RunPhase.STOPPED)


class EndReason(Enum):
    """Reason why a run has ended. The numbers are stored."""

    NONE = 0
    ROUNDS_DONE = 1
    TARGET_MET = 2
    # An operator said so.
    STOPPED = 3
    # The run of the parent has ended, or is another one.
    PARENT_ENDED = 4
    # No version was better for as long as the operator is patient.
    NOT_BETTER = 5
    # A further version would cost more privacy than the operator allows.
    PRIVACY_SPENT = 6


@dataclass(frozen=True)
class Ending:
    """Reason of a run's end, as a value and in words."""

    reason: EndReason = EndReason.NONE
    text: str = ""


@dataclass(frozen=True)
class RollBack:
    """Version that an operator wants to continue from; 0: from a new first model."""

    version: int
    reason: str

    @property
    def text(self) -> str:
        """The reason as text, for the record and for workers."""
        what = f"rolled back to version {self.version}" if self.version else "started over"
        return f"the run is {what}" + (f": {self.reason}" if self.reason else "")


# Rounds.


@dataclass(frozen=True)
class RoundOpened:
    """Begin of a round, or its continuation after a restart: workers hold its tasks that are not final."""

    round: RoundInProgress


@dataclass(frozen=True)
class TasksGiven:
    """The answer to `Select`, with one record for each new task. `secure`: the sum that their updates go into.

    `refused` says why some of them, by token, cannot be given: they are lost in the same moment.
    """

    selected: Selected
    contexts: Mapping[str, TaskContext]
    secure: SecureSum | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PartsSent:
    """A device sent what a secure sum wants of it in `phase`: shares, proofs or answers."""

    token: str
    phase: SecurePhase
    parts: Parts


@dataclass(frozen=True)
class UpdateAccepted:
    """An update is received, verified and durable; `weight` is its weight in the mean."""

    token: str
    weight: float
    report: Report


@dataclass(frozen=True)
class UpdatesMerged:
    """A round's updates are merged: into `version`, or into nothing where a round makes none.

    `commit_s`: how long the merge took.
    """

    version: Version | None
    layout: Layout
    merge: Merge
    commit_s: float


@dataclass(frozen=True)
class LedgerOpened:
    """The run releases its versions with noise, and has released these."""

    ledger: Ledger


@dataclass(frozen=True)
class ReleaseEntered:
    """A release of the round in progress is in the ledger; its version may be written now."""

    release: PrivateRelease


@dataclass(frozen=True)
class RoundEnded:
    """End of a round, all of which is stored: the run continues. `wall_now`: seconds."""

    wall_now: float


@dataclass(frozen=True)
class ParentWaits:
    """The parent ends its round at `due_at`, by this process's clock; None: it has no deadline."""

    due_at: float | None


# Versions.


@dataclass(frozen=True)
class VersionTaken:
    """Version that the run continues from; without a layout it asks for a first model."""

    version: Version
    layout: Layout


@dataclass(frozen=True)
class VersionKnown:
    """News about a kept version."""

    version: Version


@dataclass(frozen=True)
class VersionsPruned:
    """List of the versions that are kept."""

    kept: Collection[int]


@dataclass(frozen=True)
class RollBackAsked:
    """Wish of an operator to continue from an earlier version."""

    roll_back: RollBack


@dataclass(frozen=True)
class RolledBack:
    """The copy of the version is the latest, written by round `number`."""

    version: Version
    layout: Layout
    number: int


@dataclass(frozen=True)
class RollBackFailed:
    """The version could not be copied: the run stays as it is."""


# The run.


@dataclass(frozen=True)
class RunRestored:
    """State of the run as a former process stored it; `last_number` is that of the last round that ended."""

    id: str
    phase: RunPhase
    ending: Ending
    started_at: float
    paused_reason: str


@dataclass(frozen=True)
class RoundsRestored:
    """The number of the last round that ended in a former process.

    `closing_evaluation`: the last version is to be scored by workers once there are no more rounds to train.
    """

    last_number: int
    closing_evaluation: bool = True


@dataclass(frozen=True)
class ParentLeads:
    """A parent leads the run: it has the identity of the parent's run, and makes no versions."""

    id: str


@dataclass(frozen=True)
class Paused:
    """Pause: no further round opens. `reason`: why the run has paused itself."""

    reason: str = ""


@dataclass(frozen=True)
class Resumed:
    """Rounds open again."""


@dataclass(frozen=True)
class TargetMet:
    """A version has the wanted score, or versions have stopped to improve: the run ends with its round."""

    text: str
    reason: EndReason = EndReason.TARGET_MET


@dataclass(frozen=True)
class Ended:
    """The run is over."""

    phase: RunPhase
    ending: Ending


# Workers.


@dataclass(frozen=True)
class WorkerPolled:
    """A worker asks for a task, so it has none to deliver. `held`: a version, and the SHA-256 of its payload.

    `new_examples`: how many it has that it has not trained on in this run; None where it does not tell. `keys`:
    for the next secure sum; None: it takes part in none.
    """

    worker: str
    held: tuple[int, bytes] | None
    new_examples: int | None = None
    keys: PublicKeys | None = None


@dataclass(frozen=True)
class WorkerTold:
    """The answer to a poll: no task, and whether the run has ended."""

    worker: str


@dataclass(frozen=True)
class WorkerLeft:
    """A worker has left: a task that it has not begun goes to another."""

    worker: str


@dataclass(frozen=True)
class DeviceReplaced:
    """Another device has the name of a worker, and none of its tasks."""

    worker: str


@dataclass(frozen=True)
class EvaluatorPolled:
    """An evaluator asks for a task; `token` is that of a new one."""

    worker: str
    token: str


@dataclass(frozen=True)
class Evaluated:
    """An evaluator has scored a version; `metrics` None: it cannot."""

    task: Evaluation
    metrics: dict[str, float] | None
    example_count: int = 0


Event = (
    rounds.Event
    | RoundOpened
    | TasksGiven
    | PartsSent
    | LedgerOpened
    | ReleaseEntered
    | UpdateAccepted
    | UpdatesMerged
    | RoundEnded
    | ParentWaits
    | VersionTaken
    | VersionKnown
    | VersionsPruned
    | RollBackAsked
    | RolledBack
    | RollBackFailed
    | RunRestored
    | RoundsRestored
    | ParentLeads
    | Paused
    | Resumed
    | TargetMet
    | Ended
    | WorkerPolled
    | WorkerTold
    | WorkerLeft
    | DeviceReplaced
    | EvaluatorPolled
    | Evaluated
)


# Effects.


@dataclass(frozen=True)
class TaskClosed:
    """End of a task: no update of it is wanted any more, so a receiver of one stops."""

    token: str
    reason: str


@dataclass(frozen=True)
class Drop:
    """Make durable that this task ends here, and clear away what there is of it."""

    dropped: DroppedTask


Effect = rounds.Effect | TaskClosed | Drop | TellRoster | Ask | PassOn


# What a run without a round in progress does next.


@dataclass(frozen=True)
class OpenRound:
    """Open a round."""

    round: RoundInProgress


@dataclass(frozen=True)
class EndRun:
    """End the run; `after_evaluators`: once those that are alive have scored the last version."""

    ending: Ending
    after_evaluators: bool = False


@dataclass(frozen=True)
class Stay:
    """Wait until something happens."""


NextStep = OpenRound | EndRun | RollBack | Stay

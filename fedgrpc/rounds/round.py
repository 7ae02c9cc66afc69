"""The state of one round: what it is made of, how it begins, and when it next needs the time.

Values only. `fedgrpc.rounds.transitions` has the events that change a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from fedgrpc.errors import UnknownTask
from fedgrpc.rounds.events import AbandonCause, Cancel, Effect, LossCause, TaskPhase
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import RoundPolicy, capped, left_after_restart
from fedgrpc.rounds.task import Task, Tasks

NO_TASKS: Mapping[str, Task] = MappingProxyType({})
# After this many failures of one kind in a row, the next round would most likely fail as well.
PATIENCE = 3
_AT_WORK = frozenset({TaskPhase.DOWNLOADING, TaskPhase.TRAINING, TaskPhase.UPLOADING})
OPEN = tuple(phase for phase in TaskPhase if phase.open)


class RoundPhase(Enum):
    """Phase of a round; the last two are final."""

    SELECTING = 1
    REPORTING = 2
    COMMITTING = 3
    COMMITTED = 4
    ABANDONED = 5

    @property
    def final(self) -> bool:
        return self in (RoundPhase.COMMITTED, RoundPhase.ABANDONED)


@dataclass(frozen=True)
class Round:
    """The whole state of a round.

    `aim`: how many updates are wanted. `asked`: the count of the `Select` not yet answered, or 0. `ready_at`: when
    the selection window ends, if one runs. `short_since`: since when too few workers are idle. `cause`: why it was
    abandoned. `granted_s`: how much later than its own deadline it ends, since the aggregator was away. `carried`:
    tasks that outlive the round, as they stand now. In `tasks` they are late, or accepted in vain.
    """

    number: int
    policy: RoundPolicy
    opened_at: float
    phase: RoundPhase = RoundPhase.SELECTING
    tasks: Tasks = field(default_factory=Tasks)
    aim: int = 0
    asked: int = 0
    ready_at: float | None = None
    short_since: float | None = None
    deadline_at: float | None = None
    version: int | None = None
    reason: str = ""
    cause: AbandonCause = AbandonCause.NONE
    deadline_s: float = 0.0
    deadline_reason: str = ""
    granted_s: float = 0.0
    carried: Mapping[str, Task] = field(default_factory=lambda: NO_TASKS)

    def find(self, token: str) -> Task:
        """Return the task as it stands now, also when it outlives the round. Raises `UnknownTask`."""
        task = self.carried.get(token) or self.tasks.get(token)
        if task is None:
            raise UnknownTask(f"no task of round {self.number} has this token")
        return task

    def tokens(self, *phases: TaskPhase) -> tuple[str, ...]:
        """Return the tokens of the tasks in one of `phases`, by slot."""
        return tuple(token for token, task in self.tasks.items() if task.phase in phases)

    @property
    def accepted(self) -> tuple[str, ...]:
        return self.tokens(TaskPhase.ACCEPTED)

    @property
    def open_count(self) -> int:
        return self.tasks.count(OPEN, stale=True)

    @property
    def workers(self) -> frozenset[str]:
        """The workers that take no further task of this round: each had one, or still has a carried-over one."""
        return frozenset(task.worker for task in self.tasks.values() if self._occupies(task))

    def _occupies(self, task: Task) -> bool:
        if not task.phase.final or not task.carried:
            return True
        return task.phase is TaskPhase.ACCEPTED and self.counts(task)

    def counts(self, task: Task) -> bool:
        """Return whether the update counts to aim and quorum. Stale ones come on top; in a buffer all count."""
        return task.staleness == 0 or self.policy.buffer_size is not None

    @property
    def accepted_count(self) -> int:
        """Number of accepted updates that count to aim and quorum."""
        return self.tasks.count((TaskPhase.ACCEPTED,), stale=self.policy.buffer_size is not None)

    @property
    def at_work_count(self) -> int:
        """Number of open tasks that count to the aim."""
        return self.tasks.count(OPEN, stale=self.policy.buffer_size is not None)

    @property
    def missing_count(self) -> int:
        """Number of updates of the aim neither in nor worked on. Not for a buffer, which goes by the fleet."""
        return self.aim - self.accepted_count - self.at_work_count

    @property
    def accepted_weight(self) -> float:
        """Weight of the accepted updates that count, limited to `max_share` as in the mean."""
        weights = [task.weight for task in map(self.tasks.__getitem__, self.accepted) if self.counts(task)]
        share = self.policy.max_share
        if share is None:
            return sum(weights)
        # With too few updates to keep to the share, one that claims to weigh everything would end the round alone.
        return sum(capped(weights, share)) if len(weights) * share >= 1 else 0.0

    @property
    def enough_reason(self) -> str:
        """Reason why no more updates are wanted; empty while they are."""
        if self.accepted_count >= self.aim:
            return "enough updates are in"
        weight_aim = self.policy.weight_aim
        if weight_aim is None or self.accepted_count < self.policy.quorum:
            return ""
        return "enough weight is in" if self.accepted_weight >= weight_aim else ""

    def with_tasks(self, changed: Mapping[str, Task]) -> Round:
        """Return this round with some tasks changed or added."""
        return with_fields(self, tasks=self.tasks.changed(changed)) if changed else self


Step = tuple[Round, tuple[Effect, ...]]


def follow(previous: Round, number: int, policy: RoundPolicy, now: float) -> Step:
    """Return the round after `previous`, which has ended, with the tasks carried over.

    Tasks that are too stale, or that a policy of `discard` has no use for, are cancelled. Accepted ones stay.
    """
    aged = 1 if previous.phase is RoundPhase.COMMITTED else 0
    kept: dict[str, Task] = {}
    effects = []
    for token, task in previous.carried.items():
        staleness = task.staleness + aged
        # These ended while their round was committing, and need no cancelling.
        if task.phase in (TaskPhase.REJECTED, TaskPhase.FAILED):
            continue
        if task.phase is not TaskPhase.ACCEPTED and (policy.late != "carry" or staleness > policy.max_staleness):
            effects.append(Cancel(token, f"the update would be {staleness} versions behind", LossCause.LATE))
        else:
            # New slots: updates of the next round are averaged in its own order, carried-over ones first.
            kept[token] = replace(task, slot=len(kept), staleness=staleness, carried=True)
    return Round(number, policy, now, tasks=Tasks(kept)), tuple(effects)


class StoredTask(NamedTuple):
    """The part of a task that outlives a restart."""

    token: str
    worker: str
    phase: TaskPhase
    reason: str = ""
    staleness: int = 0
    weight: float = 1.0
    chosen: str = ""
    loss_cause: LossCause = LossCause.NONE


def restore(
    number: int,
    policy: RoundPolicy,
    tasks: Iterable[tuple[Any, ...]],
    aim: int,
    deadline_left_s: float | None,
    now: float,
    granted_s: float = 0.0,
) -> Round:
    """Return a round rebuilt from its stored tasks by slot: `StoredTask`s, or as many of their first fields.

    Every lease starts again: workers are not to blame that the aggregator was away. The time left is bounded by
    `left_after_restart`, whatever a wall clock that was set meanwhile says; None: the round has only carried-over
    tasks yet, and selects next. When the stored updates are enough already, `wake_at` asks for a `Tick` at once.

    How far a worker has come is not stored, so each counts as begun. A task whose worker comes back with its
    update is then carried over, even if the round ends before the worker reconnects.
    """
    rebuilt = {}
    for slot, row in enumerate(tasks):
        stored = StoredTask(*row)
        rebuilt[stored.token] = Task(
            stored.worker,
            slot,
            now + policy.lease_s,
            stored.phase,
            reason=stored.reason,
            loss_cause=stored.loss_cause,
            weight=stored.weight,
            staleness=stored.staleness,
            chosen=stored.chosen,
            begun=True,
            # A round that still selects has carried-over tasks only. Later ones are known by their staleness.
            carried=deadline_left_s is None or stored.staleness > 0,
        )
    round_ = Round(number, policy, now, tasks=Tasks(rebuilt), deadline_s=policy.deadline_s)
    if deadline_left_s is None:
        return round_
    left = left_after_restart(deadline_left_s, granted_s, policy)
    return replace(
        round_, phase=RoundPhase.REPORTING, aim=aim, deadline_at=now + left.seconds, granted_s=left.granted_s
    )


def wake_at(round_: Round) -> float | None:
    """Return when the round next needs a `Tick` if nothing else happens; None: it waits for an event."""
    times: list[float | None] = []
    if round_.phase is RoundPhase.SELECTING and not round_.asked:
        timeout_s = round_.policy.selection_timeout_s
        ready_at = round_.ready_at if round_.short_since is None else None
        times = [ready_at, None if timeout_s is None else round_.opened_at + timeout_s]
    elif round_.phase is RoundPhase.REPORTING:
        # A time in the past asks for a `Tick` at once.
        times = [round_.opened_at if round_.enough_reason else round_.deadline_at]
    if times:
        times.append(round_.tasks.first_lease_end)
    return min((time for time in times if time is not None), default=None)


def wants_workers(round_: Round) -> bool:
    """Return whether a `WorkersAvailable` could change anything: looking at a whole fleet is slow."""
    if round_.asked:
        return False
    if round_.phase is RoundPhase.REPORTING:
        return round_.policy.buffer_size is not None or round_.missing_count > 0
    return round_.phase is RoundPhase.SELECTING


def time_left(round_: Round, now: float) -> float | None:
    """Return the seconds until the deadline, at least 0; None: no deadline runs."""
    return None if round_.deadline_at is None else max(0.0, round_.deadline_at - now)


def abandon_cause(tasks: Iterable[Task]) -> AbandonCause:
    """Return why too few of these tasks have an update, as they stand when their round closes."""
    phases = {task.phase for task in tasks if not task.gone}
    if phases & {TaskPhase.FAILED, TaskPhase.REJECTED}:
        return AbandonCause.FAILED
    return AbandonCause.TOO_SLOW if phases & _AT_WORK else AbandonCause.NO_WORKERS


@dataclass(frozen=True)
class Streak:
    """Number of rounds in a row that were abandoned for one cause, and `workers` that brought no update to them.

    `delivered`: others did. Rounds that lacked workers do not count.
    """

    cause: AbandonCause = AbandonCause.NONE
    count: int = 0
    workers: frozenset[str] = frozenset()
    delivered: bool = False

    def after(self, round_: Round) -> Streak:
        """Return the streak after one more abandoned round."""
        cause = round_.cause
        if cause not in (AbandonCause.FAILED, AbandonCause.TOO_SLOW, AbandonCause.UNUSABLE):
            return self
        failed = {TaskPhase.FAILED, TaskPhase.REJECTED}
        blamed = failed if cause is AbandonCause.FAILED else failed | {TaskPhase.LATE, TaskPhase.EXPIRED}
        without = (task.worker for task in round_.tasks.values() if task.phase in blamed)
        count = self.count + 1 if cause is self.cause else 1
        delivered = self.delivered or round_.accepted_count > 0
        return Streak(cause, count, self.workers.union(without), delivered)

    @property
    def hopeless(self) -> bool:
        """True if another round would most likely fail in the same way."""
        return self.count >= PATIENCE

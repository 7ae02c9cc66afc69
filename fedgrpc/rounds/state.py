"""One round: a table of transitions and one function, `step(round, event, now) -> (round, effects)`.

The rule: `step` changes nothing but returns a new `Round`; an event that the phase does not allow raises, and
nothing has happened. `now` is any clock that never runs backwards, in seconds.

    SELECTING --Selected--> REPORTING --aim reached, or quorum at the deadline--> COMMITTING --> COMMITTED
        |                       |                                                     |
        +-----------------------+--------- no workers, no quorum, Abort --------------+--------> ABANDONED
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from fedgrpc.errors import IllegalTransition, RoundClosed, UnknownTask
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Cancel,
    Commit,
    Committed,
    Effect,
    Event,
    Failed,
    Finished,
    Offer,
    Pool,
    Progress,
    Rejected,
    Select,
    Selected,
    TaskPhase,
    Tick,
)
from fedgrpc.rounds.policy import RoundPolicy

Step = tuple["Round", tuple[Effect, ...]]


class RoundPhase(Enum):
    """Where a round stands; the last two are final."""

    SELECTING = 1
    REPORTING = 2
    COMMITTING = 3
    COMMITTED = 4
    ABANDONED = 5

    @property
    def final(self) -> bool:
        return self in (RoundPhase.COMMITTED, RoundPhase.ABANDONED)


@dataclass(frozen=True)
class Task:
    """One worker's share of the round; `slot` is its place in the canonical order of updates."""

    worker: str
    slot: int
    lease_until: float
    phase: TaskPhase = TaskPhase.OFFERED
    fraction: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Round:
    """The whole state of a round. `aim`: how many updates are wanted; `asked`: the `Select` not yet answered."""

    number: int
    policy: RoundPolicy
    opened_at: float
    phase: RoundPhase = RoundPhase.SELECTING
    tasks: Mapping[str, Task] = field(default_factory=lambda: MappingProxyType({}))
    aim: int = 0
    asked: int = 0
    ready_at: float | None = None
    deadline_at: float | None = None
    version: int | None = None
    reason: str = ""

    def tokens(self, *phases: TaskPhase) -> tuple[str, ...]:
        """Tokens of the tasks in one of `phases`, by slot."""
        return tuple(token for token, task in self.tasks.items() if task.phase in phases)

    @property
    def accepted(self) -> tuple[str, ...]:
        return self.tokens(TaskPhase.ACCEPTED)

    @property
    def open_count(self) -> int:
        return sum(task.phase.open for task in self.tasks.values())

    @property
    def workers(self) -> frozenset[str]:
        return frozenset(task.worker for task in self.tasks.values())


def step(round_: Round, event: Event, now: float) -> Step:
    """Apply one event.

    Raises `UnknownTask` for a token that is not of this round, `RoundClosed` for news of a task once no more
    updates are taken, and `IllegalTransition` for everything else that the phase does not allow. To accept an
    update again changes nothing, in whatever phase.
    """
    handler = _TABLE.get((round_.phase, type(event)))
    if handler is not None:
        return handler(round_, event, now)
    if isinstance(event, Progress | Accepted | Rejected | Failed):
        task = _task(round_, event.token)
        if isinstance(event, Accepted) and task.phase is TaskPhase.ACCEPTED:
            return round_, ()
        raise RoundClosed(f"round {round_.number} takes no more updates: it is {round_.phase.name.lower()}")
    raise IllegalTransition(
        f"{type(event).__name__} in round {round_.number}, which is {round_.phase.name.lower()}"
    )


def restore(
    number: int,
    policy: RoundPolicy,
    tasks: Iterable[tuple[str, str, TaskPhase, str]],
    aim: int,
    deadline_left_s: float,
    now: float,
) -> Round:
    """A round that takes updates, rebuilt from what was stored: (token, worker, phase, reason) by slot.

    Every lease starts anew: that the aggregator was away is no fault of its workers. The time left is at most the
    policy's, whatever a wall clock that was set in between may say. It wants a `Tick` at once when the updates
    stored are enough already.
    """
    until = now + policy.lease_s
    rebuilt = {
        token: Task(worker, slot, until, phase, reason=reason)
        for slot, (token, worker, phase, reason) in enumerate(tasks)
    }
    return Round(
        number,
        policy,
        opened_at=now,
        phase=RoundPhase.REPORTING,
        tasks=MappingProxyType(rebuilt),
        aim=aim,
        deadline_at=now + min(max(deadline_left_s, 0.0), policy.deadline_s),
    )


def wake_at(round_: Round) -> float | None:
    """When the round next wants a `Tick` if nothing else happens; None: it waits for an event."""
    times: list[float | None] = []
    if round_.phase is RoundPhase.SELECTING and not round_.asked:
        timeout = round_.policy.selection_timeout_s
        times = [round_.ready_at, None if timeout is None else round_.opened_at + timeout]
    elif round_.phase is RoundPhase.REPORTING:
        times = [round_.deadline_at, *(t.lease_until for t in round_.tasks.values() if t.phase.open)]
        if len(round_.accepted) >= round_.aim:
            times = [round_.opened_at]
    return min((time for time in times if time is not None), default=None)


def time_left(round_: Round, now: float) -> float | None:
    """Seconds until the deadline, not below 0; None: none runs."""
    return None if round_.deadline_at is None else max(0.0, round_.deadline_at - now)


def _task(round_: Round, token: str) -> Task:
    try:
        return round_.tasks[token]
    except KeyError:
        raise UnknownTask(f"no task of round {round_.number} has this token") from None


def _with_task(round_: Round, token: str, **changes: Any) -> Round:
    return _with_tasks(round_, {token: replace(round_.tasks[token], **changes)})


def _with_tasks(round_: Round, changed: Mapping[str, Task]) -> Round:
    return replace(round_, tasks=MappingProxyType({**round_.tasks, **changed}))


def _gather(round_: Round, event: Pool, now: float) -> Step:
    """Open once enough are idle and the rest of the live ones had their time to come."""
    if round_.asked:
        return round_, ()
    if len(event.idle) < round_.policy.needed_idle:
        return replace(round_, ready_at=None), ()
    ready_at = now + round_.policy.selection_window_s if round_.ready_at is None else round_.ready_at
    if len(event.idle) < event.live_count and now < ready_at:
        return replace(round_, ready_at=ready_at), ()
    aim = round_.policy.aim(event.live_count)
    count = round_.policy.ask(aim)
    return replace(round_, aim=min(aim, len(event.idle)), asked=count), (Select(count, frozenset()),)


def _gather_timeout(round_: Round, event: Tick, now: float) -> Step:
    timeout = round_.policy.selection_timeout_s
    if timeout is not None and not round_.asked and now >= round_.opened_at + timeout:
        return _abandon(round_, f"fewer than {round_.policy.needed_idle} workers came within {timeout:g} s")
    return round_, ()


def _open(round_: Round, event: Selected, now: float) -> Step:
    if len(event.tasks) < max(round_.policy.quorum, round_.policy.min_sample_size):
        _check_selected(round_, event)
        return replace(round_, asked=0, ready_at=None), ()
    opened = replace(
        round_,
        phase=RoundPhase.REPORTING,
        aim=min(round_.aim, len(event.tasks)),
        deadline_at=now + round_.policy.deadline_s,
    )
    return _add_tasks(opened, event, now)


def _add_tasks(round_: Round, event: Selected, now: float) -> Step:
    _check_selected(round_, event)
    lease_until = now + round_.policy.lease_s
    new = {
        token: Task(worker, slot, lease_until)
        for slot, (token, worker) in enumerate(event.tasks, start=len(round_.tasks))
    }
    offers = tuple(Offer(token, worker) for token, worker in event.tasks)
    return replace(_with_tasks(round_, new), asked=0), offers


def _check_selected(round_: Round, event: Selected) -> None:
    """It answers a `Select`, with no more tasks than that asked for, and one for a worker at most."""
    if not round_.asked:
        raise IllegalTransition(f"round {round_.number} has not asked for workers")
    if len(event.tasks) > round_.asked:
        raise IllegalTransition(f"{len(event.tasks)} tasks where round {round_.number} asked for {round_.asked}")
    tokens, workers = set(round_.tasks), set(round_.workers)
    for token, worker in event.tasks:
        if token in tokens or worker in workers:
            raise IllegalTransition(f"worker {worker} has a task in round {round_.number} already")
        tokens.add(token)
        workers.add(worker)


def _refill(round_: Round, event: Pool, now: float) -> Step:
    """Replace lost tasks by idle workers that have had none in this round; end it when nobody is left.

    A restored round may be complete already: that is seen here too.
    """
    if len(round_.accepted) >= round_.aim:
        return _close(round_, "enough updates are in")
    missing = round_.aim - len(round_.accepted) - round_.open_count
    exclude = round_.workers
    count = min(missing, sum(worker not in exclude for worker in event.idle))
    if round_.asked or missing <= 0:
        return round_, ()
    if count > 0:
        return replace(round_, asked=count), (Select(count, exclude),)
    if round_.open_count:
        return round_, ()
    return _give_up_waiting(round_)


def _give_up_waiting(round_: Round) -> Step:
    """Nobody works and nobody can be asked. Workers out of touch are waited for only to reach the quorum."""
    short = len(round_.accepted) < round_.policy.quorum
    if short and round_.tokens(TaskPhase.EXPIRED):
        return round_, ()
    return _close(round_, "no worker is left to wait for")


def _progress(round_: Round, event: Progress, now: float) -> Step:
    task = _task(round_, event.token)
    if task.phase.final:
        raise RoundClosed(f"the task is {task.phase.name.lower()}: {task.reason or 'done'}")
    if not event.phase.open:
        raise IllegalTransition(f"{event.phase.name.lower()} is not for a worker to say")
    lease_until = now + round_.policy.lease_s
    changes = {"phase": event.phase, "fraction": event.fraction, "lease_until": lease_until, "reason": ""}
    return _with_task(round_, event.token, **changes), ()


def _accept(round_: Round, event: Accepted, now: float) -> Step:
    task = _task(round_, event.token)
    if task.phase is TaskPhase.ACCEPTED:
        return round_, ()
    if task.phase in (TaskPhase.REJECTED, TaskPhase.FAILED):
        raise RoundClosed(f"the task is {task.phase.name.lower()}: {task.reason}")
    return _judge(_with_task(round_, event.token, phase=TaskPhase.ACCEPTED, fraction=1.0, reason=""))


def _lose(phase: TaskPhase) -> Callable[[Round, Any, float], Step]:
    def handle(round_: Round, event: Rejected | Failed, now: float) -> Step:
        if _task(round_, event.token).phase.final:
            return round_, ()
        return _with_task(round_, event.token, phase=phase, reason=event.reason), ()

    return handle


def _check_time(round_: Round, event: Tick, now: float) -> Step:
    """Whether enough is in (a restored round may begin so), then the deadline, then leases that ran out."""
    if len(round_.accepted) >= round_.aim:
        return _close(round_, "enough updates are in")
    if round_.deadline_at is not None and now >= round_.deadline_at:
        return _close(round_, f"deadline of {round_.policy.deadline_s:g} s passed")
    expired = {}
    for token, task in round_.tasks.items():
        if task.phase.open and now >= task.lease_until:
            reason = f"{SLOW[task.phase]}: not heard of for {round_.policy.lease_s:g} s"
            expired[token] = replace(task, phase=TaskPhase.EXPIRED, reason=reason)
    if not expired:
        return round_, ()
    return _with_tasks(round_, expired), tuple(Cancel(token, t.reason) for token, t in expired.items())


def _judge(round_: Round) -> Step:
    """Commit once the aim is reached."""
    if len(round_.accepted) >= round_.aim:
        return _close(round_, "enough updates are in")
    return round_, ()


def _close(round_: Round, why: str) -> Step:
    """End reporting: tasks without an update are late; commit with a quorum, abandon without."""
    late = {
        token: replace(task, phase=TaskPhase.LATE, reason=f"{SLOW[task.phase]}: {why}")
        for token, task in round_.tasks.items()
        if task.phase.open
    }
    round_ = _with_tasks(round_, late)
    cancels = tuple(Cancel(token, why) for token in late)
    accepted = round_.accepted
    if len(accepted) < round_.policy.quorum:
        round_, effects = _abandon(round_, f"{len(accepted)} of {round_.policy.quorum} needed updates: {why}")
        return round_, cancels + effects
    return replace(round_, phase=RoundPhase.COMMITTING, reason=why), (*cancels, Commit(accepted))


def _commit(round_: Round, event: Committed, now: float) -> Step:
    done = replace(round_, phase=RoundPhase.COMMITTED, version=event.version)
    return done, (Finished(committed=True, reason=round_.reason),)


def _abort(round_: Round, event: Abort, now: float) -> Step:
    ended = {
        token: replace(task, phase=TaskPhase.LATE, reason=event.reason)
        for token, task in round_.tasks.items()
        if not task.phase.final
    }
    round_, effects = _abandon(_with_tasks(round_, ended), event.reason)
    return round_, (*(Cancel(token, event.reason) for token in ended), *effects)


def _abandon(round_: Round, reason: str) -> Step:
    return replace(round_, phase=RoundPhase.ABANDONED, reason=reason), (Finished(committed=False, reason=reason),)


def _ignore(round_: Round, event: Event, now: float) -> Step:
    return round_, ()


SLOW: Mapping[TaskPhase, str] = MappingProxyType(
    {
        TaskPhase.OFFERED: "no-show",
        TaskPhase.DOWNLOADING: "slow download",
        TaskPhase.TRAINING: "slow training",
        TaskPhase.UPLOADING: "slow upload",
    }
)

_TABLE: Mapping[tuple[RoundPhase, type], Callable[[Round, Any, float], Step]] = MappingProxyType(
    {
        (RoundPhase.SELECTING, Pool): _gather,
        (RoundPhase.SELECTING, Selected): _open,
        (RoundPhase.SELECTING, Tick): _gather_timeout,
        (RoundPhase.SELECTING, Abort): _abort,
        (RoundPhase.REPORTING, Pool): _refill,
        (RoundPhase.REPORTING, Selected): _add_tasks,
        (RoundPhase.REPORTING, Progress): _progress,
        (RoundPhase.REPORTING, Accepted): _accept,
        (RoundPhase.REPORTING, Rejected): _lose(TaskPhase.REJECTED),
        (RoundPhase.REPORTING, Failed): _lose(TaskPhase.FAILED),
        (RoundPhase.REPORTING, Tick): _check_time,
        (RoundPhase.REPORTING, Abort): _abort,
        (RoundPhase.COMMITTING, Committed): _commit,
        (RoundPhase.COMMITTING, Abort): _abort,
        (RoundPhase.COMMITTING, Pool): _ignore,
        (RoundPhase.COMMITTING, Selected): _ignore,
        (RoundPhase.COMMITTING, Tick): _ignore,
        (RoundPhase.COMMITTED, Pool): _ignore,
        (RoundPhase.COMMITTED, Selected): _ignore,
        (RoundPhase.COMMITTED, Tick): _ignore,
        (RoundPhase.ABANDONED, Pool): _ignore,
        (RoundPhase.ABANDONED, Selected): _ignore,
        (RoundPhase.ABANDONED, Tick): _ignore,
    }
)

"""One round: a table of transitions and one function, `step(round, event, now) -> (round, effects)`.

The rule: `step` changes nothing but returns a new `Round`; an event that the phase does not allow raises, and
nothing has happened. `now` is any clock that never runs backwards, in seconds.

    SELECTING --Selected--> REPORTING --aim reached, or quorum at the deadline--> COMMITTING --> COMMITTED
        |                       |                                                     |
        +-----------------------+--------- no workers, no quorum, Abort --------------+--------> ABANDONED

`Rejected` while COMMITTING leaves out an accepted update that cannot be averaged: the round commits the others.
Carried-over tasks go to the next round, which `follow` opens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from fedgrpc.errors import IllegalTransition, RoundClosed
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Cancel,
    Committed,
    Event,
    Failed,
    LossCause,
    Progress,
    Rejected,
    Selected,
    TaskEvent,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.policy import RoundPolicy, left_after_restart
from fedgrpc.rounds.round import Round, RoundPhase, Step
from fedgrpc.rounds.task import Task, Tasks
from fedgrpc.rounds.transitions import (
    abort,
    add_tasks,
    check_time,
    commit,
    leave_out,
    on_workers_available,
    open_round,
    refill,
    report,
    report_carried,
    time_out_selection,
)


def step(round_: Round, event: Event, now: float) -> Step:
    """Apply one event.

    Accepting an update again changes nothing, in any phase. Raises `UnknownTask` for a token that is not of this
    round, `RoundClosed` for an event of a task once no more updates are taken, and `IllegalTransition` for
    everything else that the phase does not allow.
    """
    # Carried-over tasks live on while their round commits, so their events bypass the table.
    if isinstance(event, TaskEvent) and event.token in round_.carried:
        return report_carried(round_, event, now)
    handler = _TABLE.get((round_.phase, type(event)))
    if handler is not None:
        return handler(round_, event, now)
    if isinstance(event, TaskEvent):
        task = round_.find(event.token)
        if isinstance(event, Accepted) and task.phase is TaskPhase.ACCEPTED:
            return round_, ()
        raise RoundClosed(f"round {round_.number} takes no more updates: it is {round_.phase.name.lower()}")
    raise IllegalTransition(
        f"{type(event).__name__} in round {round_.number}, which is {round_.phase.name.lower()}"
    )


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
        times += (task.lease_until for task in round_.tasks.values() if task.phase.open)
    return min((time for time in times if time is not None), default=None)


def wants_workers(round_: Round) -> bool:
    """Whether a `WorkersAvailable` could change anything: looking at a whole fleet is slow."""
    if round_.asked:
        return False
    if round_.phase is RoundPhase.REPORTING:
        return round_.policy.buffer_size is not None or round_.missing_count > 0
    return round_.phase is RoundPhase.SELECTING


def time_left(round_: Round, now: float) -> float | None:
    """Return the seconds until the deadline, at least 0; None: no deadline runs."""
    return None if round_.deadline_at is None else max(0.0, round_.deadline_at - now)


def _ignore(round_: Round, event: Event, now: float) -> Step:
    return round_, ()


_TABLE: Mapping[tuple[RoundPhase, type], Callable[[Round, Any, float], Step]] = MappingProxyType(
    {
        (RoundPhase.SELECTING, WorkersAvailable): on_workers_available,
        (RoundPhase.SELECTING, Selected): open_round,
        (RoundPhase.SELECTING, Tick): time_out_selection,
        (RoundPhase.REPORTING, WorkersAvailable): refill,
        (RoundPhase.REPORTING, Selected): add_tasks,
        (RoundPhase.REPORTING, Tick): check_time,
        (RoundPhase.COMMITTING, Committed): commit,
        (RoundPhase.COMMITTING, Rejected): leave_out,
        **dict.fromkeys(
            product([RoundPhase.SELECTING, RoundPhase.REPORTING], [Progress, Accepted, Rejected, Failed]), report
        ),
        **dict.fromkeys(
            product([RoundPhase.SELECTING, RoundPhase.REPORTING, RoundPhase.COMMITTING], [Abort]), abort
        ),
        **dict.fromkeys(
            product(
                [RoundPhase.COMMITTING, RoundPhase.COMMITTED, RoundPhase.ABANDONED],
                [WorkersAvailable, Selected, Tick],
            ),
            _ignore,
        ),
    }
)

"""Handlers of the events by which a round gets its updates and ends. `fedgrpc.rounds.transitions` has the table.

The rule: `Round.enough_reason` says when a round has enough updates. A round ends in one place, `close`, with a
quorum or without.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fedgrpc.errors import RoundClosed
from fedgrpc.rounds.events import (
    AbandonCause,
    Abort,
    Cancel,
    CarryOver,
    Commit,
    Committed,
    Effect,
    Finished,
    LossCause,
    Rejected,
    TaskEvent,
    TaskPhase,
    Tick,
)
from fedgrpc.rounds.round import NO_TASKS, Round, RoundPhase, Step, abandon_cause
from fedgrpc.rounds.task import Task, apply_event

# Reporting updates.


def report(round_: Round, event: TaskEvent, now: float) -> Step:
    """Apply an event of a task, and close the round if enough updates are in now."""
    before = round_.find(event.token)
    after = apply_event(before, event, round_.deadline_at, round_.policy.lease_s, now)
    # A retried call brings the same event again.
    if after == before:
        return round_, ()
    round_ = round_.with_tasks({event.token: after})
    if before.phase.open and after.phase is TaskPhase.EXPIRED:
        return round_, (Cancel(event.token, after.reason, after.loss_cause),)
    reporting = after.phase is TaskPhase.ACCEPTED and round_.phase is RoundPhase.REPORTING
    if reporting and (why := round_.enough_reason):
        return close(round_, why, now)
    return round_, ()


def report_carried(round_: Round, event: TaskEvent, now: float) -> Step:
    """Apply an event of a task that outlives the round. The next round takes it as it then stands."""
    task = apply_event(round_.carried[event.token], event, None, round_.policy.lease_s, now)
    return replace(round_, carried=MappingProxyType({**round_.carried, event.token: task})), ()


def check_time(round_: Round, event: Tick, now: float) -> Step:
    """Close the round if enough updates are in (a restored round may start so) or the deadline passed.

    Otherwise expire tasks whose lease ran out.
    """
    if why := round_.enough_reason:
        return close(round_, why, now)
    if round_.deadline_at is not None and now >= round_.deadline_at:
        granted = f", and {round_.granted_s:.3g} s more after a restart," if round_.granted_s else ""
        return close(round_, f"deadline of {round_.deadline_s:g} s{granted} passed", now)
    return expire(round_, now)


def expire(round_: Round, now: float) -> Step:
    """Free the slots of tasks whose lease ran out."""
    # Expired is not final: a worker whose link returns in time revives its task.
    lease_s = round_.policy.lease_s
    expired = {
        token: task.expired(lease_s, now)
        for token, task in round_.tasks.items()
        if task.phase.open and now >= task.lease_until
    }
    effects = (Cancel(token, task.reason, task.loss_cause) for token, task in expired.items())
    return round_.with_tasks(expired), tuple(effects)


# Closing.


def close(round_: Round, why: str, now: float) -> Step:
    """End reporting: tasks without an update are late. Commit with a quorum, abandon without."""
    # The cause is read before the open tasks become late.
    short = round_.accepted_count < round_.policy.quorum
    cause = abandon_cause(round_.tasks.values())
    # Without a new version no task falls further behind.
    round_, late = _end_open(round_, why, now, staler=0 if short else 1)
    if short:
        round_, effects = _finish_without(round_, f"{_accepted_of_quorum(round_)}: {why}", cause)
        return round_, late + effects
    return replace(round_, phase=RoundPhase.COMMITTING, reason=why), (*late, Commit(round_.accepted))


def abandon(round_: Round, why: str, now: float) -> Step:
    """Abandon a round that never began to report."""
    round_, late = _end_open(round_, why, now, staler=0)
    round_, effects = _finish_without(round_, why, AbandonCause.NO_WORKERS)
    return round_, late + effects


def commit(round_: Round, event: Committed, now: float) -> Step:
    """End the round: its version is durable."""
    done = replace(round_, phase=RoundPhase.COMMITTED, version=event.version)
    return done, (Finished(committed=True, reason=round_.reason),)


def abort(round_: Round, event: Abort, now: float) -> Step:
    """End the round without a result, and without carrying any task over."""
    ended = {
        token: task.lost(TaskPhase.LATE, LossCause.LATE, event.reason, now)
        for token, task in round_.tasks.items()
        if not task.phase.final
    }
    # A carried-over task may be in both. Cancel each token once, in the order of the slots.
    tokens = dict.fromkeys([*ended, *round_.carried])
    end = Finished(committed=False, reason=event.reason)
    round_ = replace(round_.with_tasks(ended), phase=RoundPhase.ABANDONED, carried=NO_TASKS)
    round_ = replace(round_, reason=event.reason, cause=event.cause)
    return round_, (*(Cancel(token, event.reason, LossCause.LATE) for token in tokens), end)


def leave_out(round_: Round, event: Rejected, now: float) -> Step:
    """Reject an accepted update that cannot be averaged. Commit the others if they still make the quorum."""
    task = round_.find(event.token)
    if task.phase is not TaskPhase.ACCEPTED:
        raise RoundClosed(f"round {round_.number} takes no more updates: it is committing")
    refused = task.lost(TaskPhase.REJECTED, LossCause.REFUSED, event.reason, now)
    round_ = round_.with_tasks({event.token: refused})
    # The commit is computed again from the start, so that nothing of the refused update is left in it.
    if round_.accepted_count >= round_.policy.quorum:
        return round_, (Commit(round_.accepted),)
    return _finish_without(round_, f"{_accepted_of_quorum(round_)}: {event.reason}", AbandonCause.FAILED)


def _accepted_of_quorum(round_: Round) -> str:
    return f"{round_.accepted_count} of {round_.policy.quorum} needed updates"


def _end_open(round_: Round, why: str, now: float, staler: int) -> Step:
    """Mark tasks without an update as late. Carry over those worth it, `staler` versions further behind."""
    late: dict[str, Task] = {}
    carried: dict[str, Task] = {}
    effects: list[Effect] = []
    for token, task in round_.tasks.items():
        if _carries_over(round_, task, staler):
            carried[token] = task
            late[token] = ended = _carried_late(task, why, now)
            effects.append(CarryOver(token, ended.reason, ended.loss_cause))
        elif task.phase.open:
            late[token] = ended = task.timed_out(TaskPhase.LATE, why, now)
            effects.append(Cancel(token, why, ended.loss_cause))
    round_ = replace(round_.with_tasks(late), carried=MappingProxyType({**round_.carried, **carried}))
    return round_, tuple(effects)


def _carried_late(task: Task, why: str, now: float) -> Task:
    """Return the task as its round leaves it. An expired one keeps the cause for which it expired."""
    late = task.timed_out(TaskPhase.LATE, why, now) if task.phase.open else task
    return late.lost(TaskPhase.LATE, late.loss_cause, f"{late.reason}; carried into the next round", now)


def _carries_over(round_: Round, task: Task, staler: int) -> bool:
    """Return whether a task without an update is carried over: its worker has begun, and it is not too stale."""
    if round_.policy.late != "carry" or task.phase.final or not task.begun:
        return False
    return task.staleness + staler <= round_.policy.max_staleness


def _finish_without(round_: Round, why: str, cause: AbandonCause) -> Step:
    """Abandon the round. The model stays as it is, so accepted updates are carried over as good as new."""
    effects: list[Effect] = []
    if round_.policy.late == "carry":
        accepted = {token: round_.tasks[token] for token in round_.accepted}
        effects += (CarryOver(token, "accepted; carried into the next round") for token in accepted)
        round_ = replace(round_, carried=MappingProxyType({**accepted, **round_.carried}))
    round_ = replace(round_, phase=RoundPhase.ABANDONED, reason=why, cause=cause)
    return round_, (*effects, Finished(committed=False, reason=why))

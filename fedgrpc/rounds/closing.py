"""How a round ends: committed with a quorum, abandoned without; what is late is discarded or carried on."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fedgrpc.errors import RoundClosed
from fedgrpc.rounds.cause import cause_of
from fedgrpc.rounds.events import (
    Abort,
    Cancel,
    Carry,
    Cause,
    Commit,
    Committed,
    Effect,
    Finished,
    Rejected,
    TaskPhase,
)
from fedgrpc.rounds.round import NO_TASKS, Round, RoundPhase, Step
from fedgrpc.rounds.task import SLOW, Task


def close(round_: Round, why: str, now: float) -> Step:
    """End reporting: tasks without an update are late; commit with a quorum, abandon without."""
    short = round_.accepted_count < round_.policy.quorum
    cause = cause_of(round_.tasks.values())
    round_, late = _end_open(round_, why, now, staler=0 if short else 1)
    if short:
        round_, effects = _finish_without(round_, f"{_counted(round_)}: {why}", cause)
        return round_, late + effects
    return replace(round_, phase=RoundPhase.COMMITTING, reason=why), (*late, Commit(round_.accepted))


def abandon(round_: Round, why: str, now: float) -> Step:
    """End a round that never began to report."""
    round_, late = _end_open(round_, why, now, staler=0)
    round_, effects = _finish_without(round_, why, Cause.NO_WORKERS)
    return round_, late + effects


def commit(round_: Round, event: Committed, now: float) -> Step:
    """The new version is there."""
    done = replace(round_, phase=RoundPhase.COMMITTED, version=event.version)
    return done, (Finished(committed=True, reason=round_.reason),)


def abort(round_: Round, event: Abort, now: float) -> Step:
    """Nothing of the round is wanted, and nothing of it goes on."""
    ended = {
        token: task.ended(TaskPhase.LATE, event.reason, now)
        for token, task in round_.tasks.items()
        if not task.phase.final
    }
    tokens = dict.fromkeys([*ended, *round_.carried])
    end = Finished(committed=False, reason=event.reason)
    round_ = replace(round_.with_tasks(ended), phase=RoundPhase.ABANDONED, carried=NO_TASKS)
    round_ = replace(round_, reason=event.reason, cause=event.cause)
    return round_, (*(Cancel(token, event.reason) for token in tokens), end)


def leave_out(round_: Round, event: Rejected, now: float) -> Step:
    """An accepted update that cannot be averaged is rejected: the others are committed, if they are enough."""
    task = round_.find(event.token)
    if task.phase is not TaskPhase.ACCEPTED:
        raise RoundClosed(f"round {round_.number} takes no more updates: it is committing")
    round_ = round_.with_tasks({event.token: task.ended(TaskPhase.REJECTED, event.reason, now)})
    if round_.accepted_count >= round_.policy.quorum:
        return round_, (Commit(round_.accepted),)
    return _finish_without(round_, f"{_counted(round_)}: {event.reason}", Cause.FAILED)


def _counted(round_: Round) -> str:
    return f"{round_.accepted_count} of {round_.policy.quorum} needed updates"


def _end_open(round_: Round, why: str, now: float, staler: int) -> Step:
    """Tasks without an update are late; some of them go on, `staler` versions further behind."""
    late: dict[str, Task] = {}
    carried: dict[str, Task] = {}
    effects: list[Effect] = []
    for token, task in round_.tasks.items():
        if _goes_on(round_, task, staler):
            carried[token] = task
            reason = task.reason or f"{SLOW[task.phase]}: {why}"
            late[token] = task.ended(TaskPhase.LATE, f"{reason}; carried into the next round", now)
            effects.append(Carry(token, late[token].reason))
        elif task.phase.open:
            late[token] = task.ended(TaskPhase.LATE, f"{SLOW[task.phase]}: {why}", now)
            effects.append(Cancel(token, why))
    round_ = replace(round_.with_tasks(late), carried=MappingProxyType({**round_.carried, **carried}))
    return round_, tuple(effects)


def _goes_on(round_: Round, task: Task, staler: int) -> bool:
    """Whether a task without an update is worth waiting for beyond the round: its worker has begun."""
    if round_.policy.late != "carry" or task.phase.final or not task.begun:
        return False
    return task.staleness + staler <= round_.policy.max_staleness


def _finish_without(round_: Round, why: str, cause: Cause) -> Step:
    """Abandon. The model stays as it is, so what was accepted is as good for the next round."""
    effects: list[Effect] = []
    if round_.policy.late == "carry":
        accepted = {token: round_.tasks[token] for token in round_.accepted}
        effects += (Carry(token, "accepted; carried into the next round") for token in accepted)
        round_ = replace(round_, carried=MappingProxyType({**accepted, **round_.carried}))
    round_ = replace(round_, phase=RoundPhase.ABANDONED, reason=why, cause=cause)
    return round_, (*effects, Finished(committed=False, reason=why))

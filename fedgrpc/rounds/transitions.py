"""The transitions of one round: selecting workers, reporting updates, closing. The table is in `state`."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fedgrpc.errors import IllegalTransition, RoundClosed
from fedgrpc.rounds.events import (
    AbandonCause,
    Abort,
    Accepted,
    Cancel,
    CarryOver,
    Commit,
    Committed,
    Effect,
    Failed,
    Finished,
    LossCause,
    Offer,
    Progress,
    Rejected,
    Select,
    Selected,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.round import NO_TASKS, Round, RoundPhase, Step, abandon_cause
from fedgrpc.rounds.task import Task, apply_event


def on_workers_available(round_: Round, event: WorkersAvailable, now: float) -> Step:
    """Open once enough are idle and the rest of the live ones had their time to come."""
    if round_.asked:
        return round_, ()
    policy, exclude = round_.policy, round_.workers
    idle_count = sum(worker not in exclude for worker in event.idle)
    brought = round_.accepted_count + round_.at_work_count
    if policy.buffer_size is not None and round_.at_work_count:
        return _ask_for_buffer(round_, event, idle_count, now)
    if idle_count + brought < policy.needed_idle:
        return _too_few(round_, now), ()
    round_ = _enough_again(round_, now)
    ready_at = now + policy.selection_window_s if round_.ready_at is None else round_.ready_at
    # One whose carried update is in, or lost, is idle and in the round's tasks, too.
    there = {task.worker for task in round_.tasks.values()}.union(event.idle)
    if len(there) < event.live_count and now < ready_at:
        return replace(round_, ready_at=ready_at), ()
    if policy.buffer_size is not None:
        return _ask_for_buffer(round_, event, idle_count, now)
    aim = policy.aim(event.live_count)
    round_ = replace(round_, aim=min(aim, idle_count + brought))
    return _ask_or_open(round_, policy.ask(aim) - brought if idle_count else 0, now)


def _too_few(round_: Round, now: float) -> Round:
    """The selection window goes on meanwhile: one who polls again is not idle for a moment."""
    return round_ if round_.short_since is not None else replace(round_, short_since=now)


def _enough_again(round_: Round, now: float) -> Round:
    """Those who were gone for longer than the selection window get a new one to come back in."""
    if round_.short_since is None:
        return round_
    gone = now - round_.short_since > round_.policy.selection_window_s
    return replace(round_, short_since=None, ready_at=None if gone else round_.ready_at)


def _ask_for_buffer(round_: Round, event: WorkersAvailable, idle_count: int, now: float) -> Step:
    """A buffer goes on with whoever is at work: there is nobody to wait for."""
    assert round_.policy.buffer_size is not None
    missing = round_.policy.aim(event.live_count) - round_.at_work_count
    return _ask_or_open(replace(round_, aim=round_.policy.buffer_size), min(missing, idle_count), now)


def _ask_or_open(round_: Round, count: int, now: float) -> Step:
    if count > 0:
        return replace(round_, asked=count), (Select(count, round_.workers),)
    return _opened(round_, Selected(()), now), ()


def time_out_selection(round_: Round, event: Tick, now: float) -> Step:
    """Give up on a round for which too few came."""
    round_, effects = expire(round_, now)
    timeout_s = round_.policy.selection_timeout_s
    if timeout_s is not None and not round_.asked and now >= round_.opened_at + timeout_s:
        why = f"fewer than {round_.policy.needed_idle} workers came within {timeout_s:g} s"
        round_, ended = abandon(round_, why, now)
        return round_, effects + ended
    return round_, effects


def open_round(round_: Round, event: Selected, now: float) -> Step:
    """Begin to report, unless too many of those who were idle are gone."""
    _check(round_, event)
    brought = round_.accepted_count + round_.at_work_count
    enough = max(round_.policy.quorum, round_.policy.min_sample_size)
    if len(event.tasks) + brought < (1 if round_.policy.buffer_size is not None else enough):
        return _too_few(replace(round_, asked=0), now), ()
    return add_tasks(_opened(round_, event, now), event, now)


def _opened(round_: Round, event: Selected, now: float) -> Round:
    policy, deadline = round_.policy, event.deadline
    seconds = policy.deadline_s
    if deadline is not None:
        seconds = min(max(deadline.seconds, policy.deadline_floor_s), policy.deadline_s)
    aim = round_.aim
    if policy.buffer_size is None:
        aim = min(aim, len(event.tasks) + round_.accepted_count + round_.at_work_count)
    return replace(
        round_,
        phase=RoundPhase.REPORTING,
        aim=aim,
        deadline_at=now + seconds,
        deadline_s=seconds,
        deadline_reason="" if deadline is None else deadline.reason,
    )


def add_tasks(round_: Round, event: Selected, now: float) -> Step:
    """Hand out a task to each of the chosen."""
    _check(round_, event)
    lease_s = round_.policy.lease_s
    new = {
        token: Task.offered(worker, slot, lease_s, event.reasons.get(worker, ""), now)
        for slot, (token, worker) in enumerate(event.tasks, start=len(round_.tasks))
    }
    offers = tuple(Offer(token, worker) for token, worker in event.tasks)
    return replace(round_.with_tasks(new), asked=0), offers


def _check(round_: Round, event: Selected) -> None:
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


def refill(round_: Round, event: WorkersAvailable, now: float) -> Step:
    """Replace lost tasks by idle workers that have had none in this round; end it when nobody is left."""
    policy = round_.policy
    missing = round_.missing_count
    if policy.buffer_size is not None:
        missing = policy.aim(event.live_count) - round_.at_work_count
    if round_.asked or missing <= 0:
        return round_, ()
    exclude = round_.workers
    count = min(missing, sum(worker not in exclude for worker in event.idle))
    if count > 0:
        return replace(round_, asked=count), (Select(count, exclude),)
    if round_.open_count:
        return round_, ()
    return _give_up_waiting(round_, now)


def _give_up_waiting(round_: Round, now: float) -> Step:
    """Nobody works and nobody can be asked. Workers out of touch are waited for only to reach the quorum."""
    short = round_.accepted_count < round_.policy.quorum
    if short and round_.tokens(TaskPhase.EXPIRED):
        return round_, ()
    return close(round_, "no worker is left to wait for", now)


TaskEvent = Progress | Accepted | Rejected | Failed


def report(round_: Round, event: TaskEvent, now: float) -> Step:
    """What a task's news makes of the round."""
    before = round_.find(event.token)
    after = apply_event(before, event, round_.deadline_at, round_.policy.lease_s, now)
    if after == before:
        return round_, ()
    round_ = round_.with_tasks({event.token: after})
    if before.phase.open and after.phase is TaskPhase.EXPIRED:
        return round_, (Cancel(event.token, after.reason, after.loss_cause),)
    if after.phase is TaskPhase.ACCEPTED and round_.phase is RoundPhase.REPORTING:
        return _judge(round_, now)
    return round_, ()


def report_carried(round_: Round, event: TaskEvent, now: float) -> Step:
    """Apply an event of a task that outlives the round: the next one will have it."""
    task = apply_event(round_.carried[event.token], event, None, round_.policy.lease_s, now)
    return replace(round_, carried=MappingProxyType({**round_.carried, event.token: task})), ()


def check_time(round_: Round, event: Tick, now: float) -> Step:
    """Whether enough is in (a restored round may begin so), then the deadline, then tasks whose time ran out."""
    if why := round_.enough_reason:
        return close(round_, why, now)
    if round_.deadline_at is not None and now >= round_.deadline_at:
        granted = f", and {round_.granted_s:.3g} s more after a restart," if round_.granted_s else ""
        return close(round_, f"deadline of {round_.deadline_s:g} s{granted} passed", now)
    return expire(round_, now)


def expire(round_: Round, now: float) -> Step:
    """Tasks whose lease ran out lose their slots."""
    lease_s = round_.policy.lease_s
    expired = {
        token: task.expired(lease_s, now)
        for token, task in round_.tasks.items()
        if task.phase.open and now >= task.lease_until
    }
    effects = (Cancel(token, task.reason, task.loss_cause) for token, task in expired.items())
    return round_.with_tasks(expired), tuple(effects)


def _judge(round_: Round, now: float) -> Step:
    why = round_.enough_reason
    return close(round_, why, now) if why else (round_, ())


def close(round_: Round, why: str, now: float) -> Step:
    """End reporting: tasks without an update are late; commit with a quorum, abandon without."""
    short = round_.accepted_count < round_.policy.quorum
    cause = abandon_cause(round_.tasks.values())
    round_, late = _end_open(round_, why, now, staler=0 if short else 1)
    if short:
        round_, effects = _finish_without(round_, f"{_counted(round_)}: {why}", cause)
        return round_, late + effects
    return replace(round_, phase=RoundPhase.COMMITTING, reason=why), (*late, Commit(round_.accepted))


def abandon(round_: Round, why: str, now: float) -> Step:
    """End a round that never began to report."""
    round_, late = _end_open(round_, why, now, staler=0)
    round_, effects = _finish_without(round_, why, AbandonCause.NO_WORKERS)
    return round_, late + effects


def commit(round_: Round, event: Committed, now: float) -> Step:
    """The new version is there."""
    done = replace(round_, phase=RoundPhase.COMMITTED, version=event.version)
    return done, (Finished(committed=True, reason=round_.reason),)


def abort(round_: Round, event: Abort, now: float) -> Step:
    """Nothing of the round is wanted, and nothing of it goes on."""
    ended = {
        token: task.lost(TaskPhase.LATE, LossCause.LATE, event.reason, now)
        for token, task in round_.tasks.items()
        if not task.phase.final
    }
    tokens = dict.fromkeys([*ended, *round_.carried])
    end = Finished(committed=False, reason=event.reason)
    round_ = replace(round_.with_tasks(ended), phase=RoundPhase.ABANDONED, carried=NO_TASKS)
    round_ = replace(round_, reason=event.reason, cause=event.cause)
    return round_, (*(Cancel(token, event.reason, LossCause.LATE) for token in tokens), end)


def leave_out(round_: Round, event: Rejected, now: float) -> Step:
    """An accepted update that cannot be averaged is rejected: the others are committed, if they are enough."""
    task = round_.find(event.token)
    if task.phase is not TaskPhase.ACCEPTED:
        raise RoundClosed(f"round {round_.number} takes no more updates: it is committing")
    refused = task.lost(TaskPhase.REJECTED, LossCause.REFUSED, event.reason, now)
    round_ = round_.with_tasks({event.token: refused})
    if round_.accepted_count >= round_.policy.quorum:
        return round_, (Commit(round_.accepted),)
    return _finish_without(round_, f"{_counted(round_)}: {event.reason}", AbandonCause.FAILED)


def _counted(round_: Round) -> str:
    return f"{round_.accepted_count} of {round_.policy.quorum} needed updates"


def _end_open(round_: Round, why: str, now: float, staler: int) -> Step:
    """Tasks without an update are late; some of them go on, `staler` versions further behind."""
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
    """Return the task as its round leaves it: one that has expired keeps the cause of that."""
    late = task.timed_out(TaskPhase.LATE, why, now) if task.phase.open else task
    return late.lost(TaskPhase.LATE, late.loss_cause, f"{late.reason}; carried into the next round", now)


def _carries_over(round_: Round, task: Task, staler: int) -> bool:
    """Whether a task without an update is worth waiting for beyond the round: its worker has begun."""
    if round_.policy.late != "carry" or task.phase.final or not task.begun:
        return False
    return task.staleness + staler <= round_.policy.max_staleness


def _finish_without(round_: Round, why: str, cause: AbandonCause) -> Step:
    """Abandon. The model stays as it is, so what was accepted is as good for the next round."""
    effects: list[Effect] = []
    if round_.policy.late == "carry":
        accepted = {token: round_.tasks[token] for token in round_.accepted}
        effects += (CarryOver(token, "accepted; carried into the next round") for token in accepted)
        round_ = replace(round_, carried=MappingProxyType({**accepted, **round_.carried}))
    round_ = replace(round_, phase=RoundPhase.ABANDONED, reason=why, cause=cause)
    return round_, (*effects, Finished(committed=False, reason=why))

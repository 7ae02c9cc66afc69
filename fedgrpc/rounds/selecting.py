"""Who takes part: opening a round once enough are there, adding to it when tasks were lost."""

from __future__ import annotations

from dataclasses import replace

from fedgrpc.errors import IllegalTransition
from fedgrpc.rounds.closing import abandon, close
from fedgrpc.rounds.events import Offer, Pool, Select, Selected, TaskPhase, Tick
from fedgrpc.rounds.reporting import expire
from fedgrpc.rounds.round import Round, RoundPhase, Step
from fedgrpc.rounds.task import Task


def gather(round_: Round, event: Pool, now: float) -> Step:
    """Open once enough are idle and the rest of the live ones had their time to come."""
    if round_.asked:
        return round_, ()
    policy, exclude = round_.policy, round_.workers
    idle_count = sum(worker not in exclude for worker in event.idle)
    brought = round_.accepted_count + round_.at_work_count
    if policy.buffer_size is not None and round_.at_work_count:
        return _gather_buffer(round_, event, idle_count, now)
    if idle_count + brought < policy.needed_idle:
        return _too_few(round_, now), ()
    round_ = _enough_again(round_, now)
    ready_at = now + policy.selection_window_s if round_.ready_at is None else round_.ready_at
    # One whose carried update is in, or lost, is idle and in the round's tasks, too.
    there = {task.worker for task in round_.tasks.values()}.union(event.idle)
    if len(there) < event.live_count and now < ready_at:
        return replace(round_, ready_at=ready_at), ()
    if policy.buffer_size is not None:
        return _gather_buffer(round_, event, idle_count, now)
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


def _gather_buffer(round_: Round, event: Pool, idle_count: int, now: float) -> Step:
    """A buffer goes on with whoever is at work: there is nobody to wait for."""
    assert round_.policy.buffer_size is not None
    missing = round_.policy.aim(event.live_count) - round_.at_work_count
    return _ask_or_open(replace(round_, aim=round_.policy.buffer_size), min(missing, idle_count), now)


def _ask_or_open(round_: Round, count: int, now: float) -> Step:
    if count > 0:
        return replace(round_, asked=count), (Select(count, round_.workers),)
    return _opened(round_, Selected(()), now), ()


def gather_timeout(round_: Round, event: Tick, now: float) -> Step:
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


def refill(round_: Round, event: Pool, now: float) -> Step:
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

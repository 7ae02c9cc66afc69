"""The transitions of one round: a table and one function, `step(round, event, now) -> (round, effects)`.

The rule: `step` changes nothing but returns a new `Round`; an event that the phase does not allow raises, and
nothing has happened. `now` is any clock that never runs backwards, in seconds.

    SELECTING --Selected--> REPORTING --aim reached, or quorum at the deadline--> COMMITTING --> COMMITTED
        |                       |                                                     |
        +-----------------------+--------- no workers, no quorum, Abort --------------+--------> ABANDONED

`Rejected` while COMMITTING leaves out an accepted update that cannot be averaged: the round commits the others.
Carried-over tasks go to the next round, which `follow` opens.

The table at the end names the handler of each event in each phase. A handler returns the round after the event and
the effects to carry out. Those here select workers, those of `fedgrpc.rounds.reporting` take updates and end the
round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

from fedgrpc.errors import IllegalTransition, RoundClosed
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Committed,
    Event,
    Failed,
    Offer,
    Progress,
    Rejected,
    Select,
    Selected,
    TaskEvent,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.reporting import (
    abandon,
    abort,
    check_time,
    close,
    commit,
    expire,
    leave_out,
    report,
    report_carried,
)
from fedgrpc.rounds.round import Round, RoundPhase, Step
from fedgrpc.rounds.task import Task


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


def on_workers_available(round_: Round, event: WorkersAvailable, now: float) -> Step:
    """Open the round once enough workers are idle and the other live ones had the selection window to come."""
    # The shell is choosing workers. Its answer, `Selected`, decides what is still missing.
    if round_.asked:
        return round_, ()
    policy, exclude = round_.policy, round_.workers
    idle_count = sum(worker not in exclude for worker in event.idle)
    # Carried-over tasks count to the aim, so the round needs fewer new workers.
    brought = round_.accepted_count + round_.at_work_count
    if policy.buffer_size is not None and round_.at_work_count:
        return _ask_for_buffer(round_, event, idle_count, now)
    if idle_count + brought < policy.needed_idle:
        return _note_shortage(round_, now), ()
    round_ = _end_shortage(round_, now)
    ready_at = now + policy.selection_window_s if round_.ready_at is None else round_.ready_at
    # A union, since the worker of a carried-over task that is accepted or lost may be idle as well.
    there = {task.worker for task in round_.tasks.values()}.union(event.idle)
    if len(there) < event.live_count and now < ready_at:
        return replace(round_, ready_at=ready_at), ()
    if policy.buffer_size is not None:
        return _ask_for_buffer(round_, event, idle_count, now)
    if policy.poisson_rate is not None:
        # All are asked for, and the coins decide.
        return _ask_or_open(replace(round_, aim=idle_count), idle_count, now)
    aim = policy.aim(event.live_count)
    # Never aim at more than can be had now: the round would wait for its deadline.
    round_ = replace(round_, aim=min(aim, idle_count + brought))
    return _ask_or_open(round_, policy.ask(aim) - brought if idle_count else 0, now)


def _note_shortage(round_: Round, now: float) -> Round:
    """Note since when too few are idle. The window keeps running: a worker between two polls is not idle."""
    return round_ if round_.short_since is not None else replace(round_, short_since=now)


def _end_shortage(round_: Round, now: float) -> Round:
    """Clear the note. A shortage longer than the selection window gets a new window, for workers to return in."""
    if round_.short_since is None:
        return round_
    gone = now - round_.short_since > round_.policy.selection_window_s
    return replace(round_, short_since=None, ready_at=None if gone else round_.ready_at)


def _ask_for_buffer(round_: Round, event: WorkersAvailable, idle_count: int, now: float) -> Step:
    """Keep the wanted share of the fleet at work: a buffer waits for no worker, so it needs no window."""
    assert round_.policy.buffer_size is not None
    missing = round_.policy.aim(event.live_count) - round_.at_work_count
    return _ask_or_open(replace(round_, aim=round_.policy.buffer_size), min(missing, idle_count), now)


def _ask_or_open(round_: Round, count: int, now: float) -> Step:
    if count > 0:
        return replace(round_, asked=count), (Select(count, round_.workers),)
    return _opened(round_, Selected(()), now), ()


def time_out_selection(round_: Round, event: Tick, now: float) -> Step:
    """Abandon a round for which too few workers came in time."""
    round_, effects = expire(round_, now)
    timeout_s = round_.policy.selection_timeout_s
    if timeout_s is not None and not round_.asked and now >= round_.opened_at + timeout_s:
        why = f"fewer than {round_.policy.needed_idle} workers came within {timeout_s:g} s"
        round_, ended = abandon(round_, why, now)
        return round_, effects + ended
    return round_, effects


def open_round(round_: Round, event: Selected, now: float) -> Step:
    """Begin to report, unless too many of the workers that were idle have gone meanwhile."""
    _check_answer(round_, event)
    brought = round_.accepted_count + round_.at_work_count
    # A buffer makes progress with any single task. A round is pointless below its quorum.
    enough = 1 if round_.policy.buffer_size is not None else round_.policy.least
    if len(event.tasks) + brought < enough:
        return _note_shortage(replace(round_, asked=0), now), ()
    return add_tasks(_opened(round_, event, now), event, now)


def _opened(round_: Round, event: Selected, now: float) -> Round:
    """Return the round in its reporting phase: aim and deadline are now fixed."""
    policy, deadline = round_.policy, event.deadline
    seconds = policy.deadline_s
    # A learned deadline only shortens the operator's.
    if deadline is not None:
        seconds = min(max(deadline.seconds, policy.deadline_floor_s), policy.deadline_s)
    aim = round_.aim
    # Fewer may be chosen than asked for. With the old aim the round would run to its deadline.
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
    """Give a task to each chosen worker."""
    _check_answer(round_, event)
    lease_s = round_.policy.lease_s
    new = {
        token: Task.offered(worker, slot, lease_s, event.reasons.get(worker, ""), now)
        for slot, (token, worker) in enumerate(event.tasks, start=len(round_.tasks))
    }
    offers = tuple(Offer(token, worker) for token, worker in event.tasks)
    return replace(round_.with_tasks(new), asked=0), offers


def _check_answer(round_: Round, event: Selected) -> None:
    """Raise unless the event answers a `Select`, with at most as many tasks as asked for, one for each worker."""
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
    """Replace lost tasks by idle workers that had none in this round. End the round when no worker is left."""
    policy = round_.policy
    missing = round_.missing_count
    if policy.buffer_size is not None:
        missing = policy.aim(event.live_count) - round_.at_work_count
    if round_.asked or missing <= 0:
        return round_, ()
    # One task per worker and round: else a worker that fails at once would take the freed slots again and again.
    exclude = round_.workers
    count = min(missing, sum(worker not in exclude for worker in event.idle))
    # Whom a coin has left out replaces nobody.
    if count > 0 and policy.poisson_rate is None:
        return replace(round_, asked=count), (Select(count, exclude),)
    if round_.open_count:
        return round_, ()
    return _give_up_waiting(round_, now)


def _give_up_waiting(round_: Round, now: float) -> Step:
    """Close the round: no worker works on it, and none can be asked.

    Short of the quorum, wait for expired tasks all the same: an event of their workers revives them.
    """
    short = round_.accepted_count < round_.policy.quorum
    if short and round_.tokens(TaskPhase.EXPIRED):
        return round_, ()
    return close(round_, "no worker is left to wait for", now)


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

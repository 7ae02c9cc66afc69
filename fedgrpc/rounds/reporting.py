"""News of tasks, and time: who has reported, who is lost, and when it is enough."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fedgrpc.rounds.closing import close
from fedgrpc.rounds.events import Accepted, Cancel, Failed, Progress, Rejected, TaskPhase, Tick
from fedgrpc.rounds.round import Round, RoundPhase, Step
from fedgrpc.rounds.task import hear

News = Progress | Accepted | Rejected | Failed


def report(round_: Round, event: News, now: float) -> Step:
    """What a task's news makes of the round."""
    before = round_.find(event.token)
    after = hear(before, event, round_.deadline_at, round_.policy.lease_s, now)
    if after == before:
        return round_, ()
    round_ = round_.with_tasks({event.token: after})
    if before.phase.open and after.phase is TaskPhase.EXPIRED:
        return round_, (Cancel(event.token, after.reason),)
    if after.phase is TaskPhase.ACCEPTED and round_.phase is RoundPhase.REPORTING:
        return _judge(round_, now)
    return round_, ()


def report_carried(round_: Round, event: News, now: float) -> Step:
    """News of a task that outlives the round: the next one will have it."""
    task = hear(round_.carried[event.token], event, None, round_.policy.lease_s, now)
    return replace(round_, carried=MappingProxyType({**round_.carried, event.token: task})), ()


def check_time(round_: Round, event: Tick, now: float) -> Step:
    """Whether enough is in (a restored round may begin so), then the deadline, then tasks whose time ran out."""
    if why := enough(round_):
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
    return round_.with_tasks(expired), tuple(Cancel(token, task.reason) for token, task in expired.items())


def enough(round_: Round) -> str:
    """Why no more updates are wanted; empty: they are."""
    if round_.accepted_count >= round_.aim:
        return "enough updates are in"
    weight_aim = round_.policy.weight_aim
    if weight_aim is None or round_.accepted_count < round_.policy.quorum:
        return ""
    return "enough weight is in" if round_.accepted_weight >= weight_aim else ""


def _judge(round_: Round, now: float) -> Step:
    why = enough(round_)
    return close(round_, why, now) if why else (round_, ())

"""Tasks that outlive their round: which news of them counts, and how they go over into the next one.

The rule: a carried task keeps its token, its file and its row. The row goes over to the next round in the
transaction that ends its own, the file stays where it is, and whichever round commits it, commits it once.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.rounds.events import Cancel, LossCause, TaskPhase
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.state import follow
from fedgrpc.rounds.task import Task
from fedgrpc.storage.run_store import TaskRow

_TOO_LATE = "no round is left that could take the update"


@dataclass(frozen=True)
class Dropped:
    """A task that no further round takes, as it then stands; `round` is the last that it was of."""

    token: str
    round: int
    task: Task


def takes_news(state: Round, token: str) -> bool:
    """Whether the round, as it stands, has a use for news of this task."""
    if token in state.carried:
        return True
    return token in state.tasks and state.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING)


def stale(state: Round, token: str) -> bool:
    """Whether a newer version than the task's is there or about to be: it is not worth beginning again."""
    if token in state.carried and state.phase in (RoundPhase.COMMITTING, RoundPhase.COMMITTED):
        return True
    return state.find(token).staleness > 0


def carried_rows(current: CurrentRound, state: Round, now: float) -> list[TaskRow]:
    """What is stored of the tasks that go over from a round that ended in `state` into the one after it."""
    after, _ = follow(state, state.number + 1, state.policy, now)
    return current.rows(after)


def going_on(
    current: CurrentRound, number: int, policy: RoundPolicy, base_version: int, wall_now: float, now: float
) -> tuple[CurrentRound, list[Dropped]]:
    """The round after `current` with the tasks that it carries on, and those that it does not."""
    state, cancelled = follow(current.state, number, policy, now)
    after = CurrentRound(state, current.kind, base_version, wall_now)
    for token, task in state.tasks.items():
        if token in current.reports:
            after.reports[token] = current.reports[token]
        after.local_tasks[token] = current.local_task(token)
        after.device_classes[task.worker] = current.device_classes.get(task.worker, "")
    reasons = {effect.token: effect.reason for effect in cancelled if isinstance(effect, Cancel)}
    lost = [
        _dropped(current, token, task, reasons.get(token, ""), now)
        for token, task in current.state.carried.items()
        if token not in state.tasks
    ]
    return after, lost


def ending_here(current: CurrentRound, now: float) -> list[Dropped]:
    """All that `current` would have carried on: there is no round of its kind after it."""
    return [_dropped(current, token, task, _TOO_LATE, now) for token, task in current.state.carried.items()]


def _dropped(current: CurrentRound, token: str, task: Task, reason: str, now: float) -> Dropped:
    """An expired one may have been on its way back; one that is final stays what it is."""
    if not task.phase.final:
        task = task.lost(TaskPhase.LATE, LossCause.LATE, reason, now)
    return Dropped(token, current.state.number, task)

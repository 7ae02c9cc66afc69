"""A round told as a story: each line of a test is one event, and returns the effects it had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    LossCause,
    Progress,
    Rejected,
    Select,
    Selected,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import Round
from fedgrpc.rounds.transitions import step

Effects = tuple[Effect, ...]


class Scenario:
    """A round with its clock at `now`; the task of worker "a" has the token "a"."""

    def __init__(self, policy: RoundPolicy | None = None, number: int = 1, round_: Round | None = None) -> None:
        self.now = 100.0
        self.round = round_ or Round(number, policy or RoundPolicy(), self.now)
        self.effects: list[Effect] = []

    def send(self, event: Event) -> Effects:
        self.round, effects = step(self.round, event, self.now)
        self.effects += effects
        return effects

    def wait(self, seconds: float) -> Effects:
        self.now += seconds
        return self.send(Tick())

    def pool(self, idle: str = "", live_count: int | None = None) -> Effects:
        """`idle`: names of one letter."""
        return self.send(WorkersAvailable(tuple(idle), len(idle) if live_count is None else live_count))

    def select(self, workers: str) -> Effects:
        return self.send(Selected(tuple((worker, worker) for worker in workers)))

    def open(self, workers: str) -> Scenario:
        """Bring the round to REPORTING with a task for each worker that it asks for."""
        (select,) = self.pool(workers)
        assert isinstance(select, Select)
        self.select(workers[: select.count])
        return self

    def progress(self, token: str, phase: TaskPhase = TaskPhase.TRAINING, fraction: float = 0.0) -> Effects:
        return self.send(Progress(token, phase, fraction))

    def accept(self, tokens: Iterable[str]) -> Effects:
        """Updates of several workers, in this order; the effects of the last."""
        effects: Effects = ()
        for token in tokens:
            effects = self.send(Accepted(token))
        return effects

    def reject(self, token: str, reason: str = "norm over the bound") -> Effects:
        return self.send(Rejected(token, reason))

    def fail(self, token: str, reason: str = "out of memory") -> Effects:
        return self.send(Failed(token, reason))

    def commit(self, version: int = 2) -> Effects:
        return self.send(Committed(version))

    def abort(self, reason: str = "stopped") -> Effects:
        return self.send(Abort(reason))

    def phase(self, token: str) -> TaskPhase:
        return self.round.tasks[token].phase

    def reason(self, token: str) -> str:
        return self.round.tasks[token].reason

    def loss_cause(self, token: str) -> LossCause:
        return self.round.tasks[token].loss_cause


def committed_tokens(effects: Sequence[Effect]) -> tuple[str, ...] | None:
    """What the only `Commit` among the effects commits."""
    commits = [effect.tokens for effect in effects if isinstance(effect, Commit)]
    assert len(commits) <= 1
    return commits[0] if commits else None


def cancelled(effects: Sequence[Effect]) -> set[str]:
    return {effect.token for effect in effects if isinstance(effect, Cancel)}


def finished(effects: Sequence[Effect]) -> Finished | None:
    ends = [effect for effect in effects if isinstance(effect, Finished)]
    assert len(ends) <= 1
    return ends[0] if ends else None

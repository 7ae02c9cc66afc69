"""The round in progress: its pure state, and one record for each of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fedgrpc.errors import RoundClosed, WrongIdentity
from fedgrpc.rounds.events import Cancel, Effect, Event, Failed, LossCause, Rejected, TaskPhase
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import Dominance, RoundPolicy, TaskKind, dominant
from fedgrpc.rounds.round import Round, RoundPhase, Step, follow
from fedgrpc.rounds.task import Task
from fedgrpc.rounds.transitions import step
from fedgrpc.rounds.version import Jump
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.task_context import NOTHING_KNOWN, LocalTask, Report, TaskContext

RoundStep = Callable[[Round, Event, float], Step]
_NO_CONTEXTS: Mapping[str, TaskContext] = MappingProxyType({})
_NO_METRICS: Mapping[str, float] = MappingProxyType({})
_TOO_LATE = "no round is left that could take the update"
_LOST = (TaskPhase.REJECTED, TaskPhase.FAILED, TaskPhase.LATE)


@dataclass(frozen=True)
class DroppedTask:
    """A carried-over task that no further round takes, as it then stands; `round` is the last it belonged to."""

    token: str
    round: int
    task: Task


@dataclass(frozen=True)
class RoundInProgress:
    """One round of a run; `started_at` is wall time, seconds.

    `due_at`, by the clock of `state`: until when a parent waits; None: there is none. `earlier_s`: how long the
    round was open in former processes, by the wall clock, which alone outlives one. `jump`, `training_metrics` and
    `commit_s` are of the version that it made. `secure`: the sum that its updates go into; None: each is seen.
    """

    state: Round
    kind: TaskKind
    base_version: int
    started_at: float
    contexts: Mapping[str, TaskContext] = field(default_factory=lambda: _NO_CONTEXTS)
    training_metrics: Mapping[str, float] = field(default_factory=lambda: _NO_METRICS)
    jump: Jump = Jump.NONE
    commit_s: float = 0.0
    due_at: float | None = None
    earlier_s: float = 0.0
    secure: SecureSum | None = None

    def __contains__(self, token: object) -> bool:
        """Return whether this is a token of one of its tasks, or of one that it carries over."""
        return token in self.state.tasks or token in self.state.carried

    @property
    def number(self) -> int:
        return self.state.number

    @property
    def open(self) -> bool:
        """True if it still selects or takes updates."""
        return self.state.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING)

    @property
    def may_end(self) -> bool:
        """True unless it is over or its version is being made. One that waits for devices to answer may end."""
        asking = self.secure is not None and self.secure.asking
        return self.open or (asking and not self.state.phase.final)

    def context(self, token: str) -> TaskContext:
        """Return what is known of a task beside its phase."""
        return self.contexts.get(token, NOTHING_KNOWN)

    def local_task(self, token: str) -> LocalTask:
        """Return what the worker of a task makes of the model."""
        return self.context(token).local

    def keeps(self, token: str, name: str) -> bool:
        """Return whether the worker of a task keeps the tensor of that name to itself."""
        return self.local_task(token).plan.is_kept_back(name)

    def report(self, token: str) -> Report:
        """Return what came with an accepted update."""
        report = self.context(token).report
        assert report is not None, f"the update of task {token} is not accepted"
        return report

    def worker_of(self, token: str) -> str:
        """Return the name of a task's worker. Raises `UnknownTask`."""
        return self.state.find(token).worker

    def version_of(self, token: str) -> int:
        """Return the version that the worker of a task was given."""
        return self.base_version - self.state.find(token).staleness

    @property
    def weights(self) -> dict[str, float]:
        """Weights in the mean, by token; none before the round has committed."""
        contexts = ((token, self.context(token)) for token in self.state.tasks)
        return {token: context.weight for token, context in contexts if context.weight is not None}

    @property
    def dominance(self) -> Dominance | None:
        """The worker that is more than half of the mean, once the weights are known."""
        if self.kind is not TaskKind.TRAIN:
            return None
        summed: dict[str, float] = {}
        for token, weight in self.weights.items():
            worker = self.state.tasks[token].worker
            summed[worker] = summed.get(worker, 0.0) + weight
        return dominant(summed)

    def wants(self, token: str) -> bool:
        """Return whether the round, as it stands, has a use for events of this task."""
        return token in self.state.carried or (token in self.state.tasks and self.open)

    def takes_update(self, token: str) -> bool:
        """Return whether this task may still deliver its update."""
        return self.wants(token) and self.state.find(token).phase not in (*_LOST, TaskPhase.ACCEPTED)

    def check_task(self, worker: str, token: str) -> TaskPhase:
        """Return the phase of a task that may still send, or has sent, its update.

        Raises `WrongIdentity`, and `RoundClosed` when its update is not wanted any more.
        """
        task = self.state.find(token)
        phase = _checked(worker, task.worker, task.phase, task.reason)
        if phase is not TaskPhase.ACCEPTED and not self.wants(token):
            raise RoundClosed(f"round {self.number} takes no more updates")
        return phase

    def step(
        self, event: Event, now: float, step: RoundStep = step
    ) -> tuple[RoundInProgress, tuple[Effect, ...], list[str]]:
        """Apply an event by `step`, and return the round after it, its effects, and the tasks that it closed.

        A task is closed when it could deliver an update before the event and cannot after it. Raises as `step`.
        """
        state, effects = step(self.state, event, now)
        after = with_fields(self, state=state)
        if isinstance(event, Rejected | Failed):
            touched: Iterable[str] = (event.token,)
        else:
            # Any other event closes tasks only by ending a phase. Most end none, and there are thousands.
            touched = () if state.phase is self.state.phase else self.state.tasks
        closed = [
            token
            for token in touched
            if self.takes_update(token)
            and not after.takes_update(token)
            and state.find(token).phase is not TaskPhase.ACCEPTED
        ]
        return after, effects, closed

    def is_stale(self, token: str) -> bool:
        """Return whether a newer version than the task's is there or near: the task is not worth restarting."""
        if token in self.state.carried and self.state.phase in (RoundPhase.COMMITTING, RoundPhase.COMMITTED):
            return True
        return self.state.find(token).staleness > 0

    def with_contexts(self, changed: Mapping[str, TaskContext]) -> RoundInProgress:
        """Return this round with some contexts replaced or added."""
        # Plain dictionaries, which are copied several times as fast as views of them.
        return with_fields(self, contexts={**self.contexts, **changed})

    def with_merge(
        self,
        weights: Mapping[str, float],
        scales: Mapping[str, float],
        distances: Mapping[str, float] = _NO_METRICS,
    ) -> RoundInProgress:
        """Return this round with the weight, the scale and the distance of each update in the mean."""
        merged = {
            token: with_fields(
                self.context(token), weight=weight, scale=scales.get(token), distance=distances.get(token)
            )
            for token, weight in weights.items()
        }
        return self.with_contexts(merged)

    def ended_by(self, due_at: float | None) -> RoundInProgress:
        """Return this round with a deadline no later than `due_at`, when its parent ends its own."""
        deadline_at = self.state.deadline_at
        if due_at is None or deadline_at is None or due_at >= deadline_at:
            return replace(self, due_at=due_at)
        return replace(self, due_at=due_at, state=replace(self.state, deadline_at=due_at))

    def following(
        self, number: int, policy: RoundPolicy, base_version: int, wall_now: float, now: float
    ) -> tuple[RoundInProgress, list[DroppedTask]]:
        """Return the round after this one with the tasks that it carries over, and those that it does not."""
        state, cancelled = follow(self.state, number, policy, now)
        contexts = {token: self.context(token).carried_over() for token in state.tasks}
        after = RoundInProgress(state, self.kind, base_version, wall_now, contexts)
        reasons = {effect.token: effect.reason for effect in cancelled if isinstance(effect, Cancel)}
        lost = (token for token in self.state.carried if token not in state.tasks)
        return after, self._dropped(lost, reasons, now)

    def dropped(self, now: float) -> list[DroppedTask]:
        """Return all tasks that it would have carried over: there is no round of its kind after it."""
        return self._dropped(self.state.carried, dict.fromkeys(self.state.carried, _TOO_LATE), now)

    def _dropped(self, tokens: Iterable[str], reasons: Mapping[str, str], now: float) -> list[DroppedTask]:
        dropped = []
        for token in tokens:
            task = self.state.carried[token]
            # An expired task may have been on its way back; a final one stays what it is.
            if not task.phase.final:
                task = task.lost(TaskPhase.LATE, LossCause.LATE, reasons.get(token, ""), now)
            dropped.append(DroppedTask(token, self.number, task))
        return dropped


def check_ended_task(worker: str, owner: str, phase: TaskPhase, reason: str) -> TaskPhase:
    """Return the phase of a task whose round has ended, as it was stored: ACCEPTED.

    Raises `WrongIdentity`, and `RoundClosed` for any other phase.
    """
    if not phase.final:
        phase = TaskPhase.LATE
    return _checked(worker, owner, phase, reason or "its round has ended")


def _checked(worker: str, owner: str, phase: TaskPhase, reason: str) -> TaskPhase:
    """Return the phase of a task. Raises `WrongIdentity`, and `RoundClosed` for one that is lost."""
    if owner != worker:
        raise WrongIdentity("the token belongs to another worker")
    if phase in _LOST:
        raise RoundClosed(f"the task is {phase.name.lower()}: {reason}")
    return phase

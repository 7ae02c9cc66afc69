"""One run: everything it knows, and one method that changes it, `RunMachine.apply(event, now) -> effects`.

The rule: nobody else writes to a run. An event that the run or its round does not allow raises, and nothing has
happened. `foresee` returns the run as an event would leave it, so that the shell can store that before it applies
the event. `now` is any clock that never runs backwards, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fedgrpc.errors import IllegalTransition, NotFound
from fedgrpc.rounds import events as rounds
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Cancel,
    Committed,
    Failed,
    Offer,
    Rejected,
    TaskPhase,
)
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase, Streak
from fedgrpc.rounds.task import Task
from fedgrpc.rounds.transitions import step
from fedgrpc.runs.events import (
    DeviceReplaced,
    Drop,
    Effect,
    Ended,
    Ending,
    Evaluated,
    EvaluatorPolled,
    Event,
    LedgerOpened,
    ParentLeads,
    ParentWaits,
    PartsSent,
    Paused,
    ReleaseEntered,
    Resumed,
    RollBackAsked,
    RollBackFailed,
    RolledBack,
    RoundEnded,
    RoundOpened,
    RoundsRestored,
    RunPhase,
    RunRestored,
    TargetMet,
    TaskClosed,
    TasksGiven,
    UpdateAccepted,
    UpdatesMerged,
    VersionKnown,
    VersionsPruned,
    VersionTaken,
    WorkerLeft,
    WorkerPolled,
    WorkerTold,
)
from fedgrpc.runs.round_in_progress import DroppedTask, RoundInProgress, RoundStep
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.summing import SummingState

Effects = tuple[Effect, ...]
E = TypeVar("E", bound=rounds.Event)


class RunMachine(SummingState):
    """Run that events change, by `apply` and in no other way."""

    def __init__(self, rules: RunRules, run_id: str, started_at: float, step: RoundStep = step) -> None:
        """Start a run without a model; `step` applies events to its rounds."""
        super().__init__(rules, run_id, started_at)
        self._round_step = step

    def apply(self, event: Event, now: float) -> Effects:
        """Apply one event. Raises as `rounds.step` does, and `IllegalTransition`; nothing has then happened."""
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            return handler(self, event, now)
        return self.step_round(event, now)  # type: ignore[arg-type]

    def foresee(self, event: Event, now: float) -> RunMachine:
        """Return the run as the event would leave it; this one stays as it is. Raises as `apply`."""
        after = RunMachine.__new__(type(self))
        after.__dict__.update(self.__dict__)
        after.leases, after.held, after.told = dict(self.leases), dict(self.held), set(self.told)
        after.new_examples, after.keys = dict(self.new_examples), dict(self.keys)
        after.versions, after.evaluations = self.versions.copy(), self.evaluations.copy()
        after.apply(event, now)
        return after

    # Rounds.

    def step_round(self, event: rounds.Event, now: float) -> Effects:
        """Apply an event to the round in progress."""
        before, summed = self.current, self._foreseen_sum(event, now)
        self.round, effects, closed = before.step(event, now, self._round_step)
        state = self.round.state
        for effect in effects:
            if isinstance(effect, Offer):
                self.leases[effect.worker] = effect.token
            elif isinstance(effect, Cancel) and state.tasks[effect.token].phase.final:
                self._release(state.tasks[effect.token].worker, effect.token)
        if isinstance(event, Accepted | Rejected | Failed):
            self._release(state.find(event.token).worker, event.token)
        done = (*effects, *(_task_closed(token, state.find(token)) for token in closed))
        return done if before.secure is None else (*self._sum_follows(done, before, summed, event, now),)

    def _release(self, worker: str, token: str) -> None:
        """Free the worker, if it is this task that it holds."""
        if self.leases.get(worker) == token:
            del self.leases[worker]

    def _open_round(self, event: RoundOpened, now: float) -> Effects:
        if self.round is not None:
            raise IllegalTransition(f"round {self.round.number} is in progress")
        self.round = event.round
        tasks = event.round.state.tasks
        self.leases.update({task.worker: token for token, task in tasks.items() if not task.phase.final})
        return ()

    def _give_tasks(self, event: TasksGiven, now: float) -> Effects:
        effects = self.step_round(event.selected, now)
        tasks = self.current.state.tasks
        self.round = self.current.with_contexts(
            {token: context for token, context in event.contexts.items() if token in tasks}
        )
        if event.secure is not None and self.current.state.phase is RoundPhase.REPORTING:
            self.round = replace(self.current, secure=event.secure)
            for worker in event.secure.state.graph:
                # Each key is for one sum.
                self.keys.pop(worker, None)
        if self.ledger is not None and self.current.kind is TaskKind.TRAIN:
            self.ledger = self.ledger.chosen(worker for _, worker in event.selected.tasks)
        for token, reason in event.refused.items():
            if self.wants(token):
                effects += self.step_round(Rejected(token, reason), now)
        return effects

    def _accept(self, event: UpdateAccepted, now: float) -> Effects:
        self.round_of(event.token)
        effects = self.step_round(Accepted(event.token, event.weight), now)
        if (worker := self.current.state.find(event.token).worker) in self.new_examples:
            # What it was trained on is new no more, before the worker polls and says so.
            self.new_examples[worker] = 0
        context = with_fields(self.current.context(event.token), report=event.report)
        self.round = self.current.with_contexts({event.token: context})
        return effects

    def _open_ledger(self, event: LedgerOpened, now: float) -> Effects:
        self.ledger = event.ledger
        return ()

    def _enter_release(self, event: ReleaseEntered, now: float) -> Effects:
        if self.ledger is None:
            raise IllegalTransition("this run releases its versions as they are")
        self.ledger = self.ledger.entered(event.release)
        return ()

    def _merge(self, event: UpdatesMerged, now: float) -> Effects:
        number = self.current.base_version if event.version is None else event.version.version
        effects = self.step_round(Committed(number), now)
        merge = event.merge
        round_ = self.current.with_merge(merge.weights, merge.scales, merge.distances)
        self.round = replace(round_, training_metrics=merge.training_metrics, commit_s=event.commit_s)
        # Without scores of this round's base, one more round scores the last version.
        self.closing_evaluation = self.rules.evaluate and bool(merge.scores.metrics)
        if event.version is not None:
            self.round = replace(self.round, jump=event.version.jump)
            self._take_version(VersionTaken(event.version, event.layout), now)
        return effects

    def _hurry(self, event: ParentWaits, now: float) -> Effects:
        self.round = self.current.ended_by(event.due_at)
        return ()

    def _end_round(self, event: RoundEnded, now: float) -> Effects:
        """Leave the round behind. Its carried-over tasks open the next one at once: events of them may come."""
        ended = self.current
        if not ended.state.phase.final:
            raise IllegalTransition(f"round {ended.number} has not ended")
        self.last_number = max(self.last_number, ended.number)
        self._note_end(ended)
        self.round, dropped = self._after(ended, event.wall_now, now)
        kept = () if self.round is None else self.round.state.tasks
        for token, task in ended.state.tasks.items():
            if token not in kept:
                self._release(task.worker, token)
        closed = (each for each in dropped if ended.takes_update(each.token))
        return (*map(Drop, dropped), *(_task_closed(each.token, each.task) for each in closed))

    def _note_end(self, ended: RoundInProgress) -> None:
        if ended.kind is TaskKind.EVALUATE:
            self.closing_evaluation = False
        elif ended.state.phase is RoundPhase.COMMITTED:
            self.streak = Streak()
        elif not self.ended and self.rolling_back is None:
            self.streak = self.streak.after(ended.state)

    def _after(
        self, ended: RoundInProgress, wall_now: float, now: float
    ) -> tuple[RoundInProgress | None, list[DroppedTask]]:
        if not (ended.state.carried and self.going_on and self.next_kind is ended.kind):
            return None, ended.dropped(now)
        policy = self.rules.policy.for_kind(ended.kind)
        return ended.following(self.last_number + 1, policy, self.version, wall_now, now)

    # Versions.

    def _take_version(self, event: VersionTaken, now: float) -> Effects:
        version = event.version
        self.version, self.layout, self.trained = version.version, event.layout, version.trained
        self.versions.add(version)
        return ()

    def _know_version(self, event: VersionKnown, now: float) -> Effects:
        self.versions.add(event.version)
        return ()

    def _prune_versions(self, event: VersionsPruned, now: float) -> Effects:
        self.versions.keep_only(event.kept)
        return ()

    def _ask_roll_back(self, event: RollBackAsked, now: float) -> Effects:
        self._check_roll_back(event.roll_back.version)
        self.rolling_back = event.roll_back
        return self._abort(event.roll_back.text, now)

    def _check_roll_back(self, version: int) -> None:
        """Raise `IllegalTransition`, and `NotFound` when the version is not kept."""
        self._check_running()
        if not self.makes_versions:
            raise IllegalTransition("versions are made by the parent of this aggregator: roll back there")
        if self.rolling_back is not None:
            raise IllegalTransition(f"the run is being rolled back to version {self.rolling_back.version} already")
        known = self.versions.get(version)
        if version and (known is None or not known.sha256):
            kept = ", ".join(map(str, self.versions))
            raise NotFound(f"model version {version} is not kept; kept are {kept or 'none'}")
        if not self.version:
            raise NotFound("there is no model version yet")

    def _roll_back(self, event: RolledBack, now: float) -> Effects:
        self.rolling_back, self.last_number = None, event.number
        self.closing_evaluation = self.rules.evaluate
        return self._take_version(VersionTaken(event.version, event.layout), now)

    def _fail_roll_back(self, event: RollBackFailed, now: float) -> Effects:
        self.rolling_back = None
        return ()

    # The run.

    def _restore(self, event: RunRestored, now: float) -> Effects:
        self.id, self.started_at = event.id, event.started_at
        self.phase, self.ending, self.paused_reason = event.phase, event.ending, event.paused_reason
        return ()

    def _restore_rounds(self, event: RoundsRestored, now: float) -> Effects:
        self.last_number = event.last_number
        self.closing_evaluation = self.rules.evaluate and event.closing_evaluation
        return ()

    def _follow_parent(self, event: ParentLeads, now: float) -> Effects:
        self.id, self.makes_versions = event.id, False
        return ()

    def _check_running(self) -> None:
        if self.ended:
            raise IllegalTransition(f"the run has ended: {self.ending.text}")

    def _pause(self, event: Paused, now: float) -> Effects:
        self._check_running()
        self.phase, self.paused_reason = RunPhase.PAUSED, event.reason
        return ()

    def _resume(self, event: Resumed, now: float) -> Effects:
        self._check_running()
        self.phase, self.paused_reason = RunPhase.RUNNING, ""
        # An operator who resumes a run has looked into the cause, so the count starts over.
        self.streak = Streak() if self.streak.hopeless else self.streak
        return ()

    def _meet_target(self, event: TargetMet, now: float) -> Effects:
        if not self.ended:
            self.ending = Ending(event.reason, event.text)
        return ()

    def _end(self, event: Ended, now: float) -> Effects:
        """Enter a final phase. The first end counts. A round that is committing continues."""
        if self.ended:
            return ()
        self.phase, self.ending, self.paused_reason = event.phase, event.ending, ""
        return self._abort(event.ending.text, now)

    def _abort(self, reason: str, now: float) -> Effects:
        """End the round, unless it is committing already."""
        if self.round is None or not self.round.may_end:
            return ()
        return self.step_round(Abort(reason), now)

    # Workers.

    def _hear_poll(self, event: WorkerPolled, now: float) -> Effects:
        """Take a carried-over task back from a worker that has lost it: restarting it is not worth while."""
        self.held.pop(event.worker, None)
        if event.held is not None:
            self.held[event.worker] = event.held
        self.new_examples.pop(event.worker, None)
        if event.new_examples is not None:
            self.new_examples[event.worker] = event.new_examples
        self.keys.pop(event.worker, None)
        if event.keys is not None and self.rules.secure:
            self.keys[event.worker] = event.keys
        token = self.task_of(event.worker)
        if token is None or not self.current.is_stale(token):
            return ()
        return self.step_round(Failed(token, "its worker has lost it", gone=True), now)

    def _answer(self, event: WorkerTold, now: float) -> Effects:
        if self.ended:
            self.told.add(event.worker)
        return ()

    def _leave(self, event: WorkerLeft, now: float) -> Effects:
        # Its certificate may be revoked.
        self.keys.pop(event.worker, None)
        token = self.task_of(event.worker)
        if token is None or self.current.state.find(token).phase is not TaskPhase.OFFERED:
            return ()
        return self.step_round(Failed(token, "its worker has left", gone=True), now)

    def _replace_device(self, event: DeviceReplaced, now: float) -> Effects:
        self.held.pop(event.worker, None)
        self.new_examples.pop(event.worker, None)
        self.keys.pop(event.worker, None)
        if task := self.evaluations.held_by(event.worker):
            self.evaluations.give_back(task)
        token = self.task_of(event.worker)
        if token is None:
            return ()
        return self.step_round(Failed(token, "its device is gone, and another has its name", gone=True), now)

    def _hear_evaluator(self, event: EvaluatorPolled, now: float) -> Effects:
        self.evaluations.offer(event.worker, self.version if self.began else 0, event.token)
        return ()

    def _hear_scores(self, event: Evaluated, now: float) -> Effects:
        if event.metrics is None:
            self.evaluations.give_back(event.task)
        else:
            self.evaluations.score(event.task, event.metrics, event.example_count)
        return ()


def _task_closed(token: str, task: Task) -> TaskClosed:
    return TaskClosed(token, f"the task is {task.phase.name.lower()}: {task.reason}")


_HANDLERS: Mapping[type, Callable[[RunMachine, Any, float], Effects]] = {
    RoundOpened: RunMachine._open_round,
    TasksGiven: RunMachine._give_tasks,
    PartsSent: RunMachine._hear_parts,
    LedgerOpened: RunMachine._open_ledger,
    ReleaseEntered: RunMachine._enter_release,
    UpdateAccepted: RunMachine._accept,
    UpdatesMerged: RunMachine._merge,
    ParentWaits: RunMachine._hurry,
    RoundEnded: RunMachine._end_round,
    VersionTaken: RunMachine._take_version,
    VersionKnown: RunMachine._know_version,
    VersionsPruned: RunMachine._prune_versions,
    RollBackAsked: RunMachine._ask_roll_back,
    RolledBack: RunMachine._roll_back,
    RollBackFailed: RunMachine._fail_roll_back,
    RunRestored: RunMachine._restore,
    RoundsRestored: RunMachine._restore_rounds,
    ParentLeads: RunMachine._follow_parent,
    Paused: RunMachine._pause,
    Resumed: RunMachine._resume,
    TargetMet: RunMachine._meet_target,
    Ended: RunMachine._end,
    WorkerPolled: RunMachine._hear_poll,
    WorkerTold: RunMachine._answer,
    WorkerLeft: RunMachine._leave,
    DeviceReplaced: RunMachine._replace_device,
    EvaluatorPolled: RunMachine._hear_evaluator,
    Evaluated: RunMachine._hear_scores,
}

"""The coordinator: sole owner of a run's state. It feeds `rounds.step`, and does what the rounds ask for.

The rule: events are applied at once, on the event loop, by whoever brings them (`dispatch`); all that takes
time, selecting with its durable record and committing, is done by one task (`fedgrpc.aggregator.driver`). What
the world is told is stored first: a task before it is offered, an update before it is accepted, a version before
it is known.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.carrying import stale, takes_news
from fedgrpc.aggregator.evaluations import Evaluation, Evaluations
from fedgrpc.aggregator.fleet import Allowance, Fleet, Worker
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.report import CurrentRound, Report
from fedgrpc.aggregator.run_state import Assignment, Beat, RollBack, RunState
from fedgrpc.aggregator.scores import for_log
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.training_instructions import TrainingInstructions
from fedgrpc.aggregator.versions import Versions
from fedgrpc.aggregator.waking import Waking
from fedgrpc.aggregator.weights import Weighing
from fedgrpc.aio import Changes
from fedgrpc.errors import (
    FedgrpcError,
    IllegalTransition,
    NotFound,
    RoundClosed,
    UnknownTask,
    UnknownWorker,
    UnusableUpdate,
    UsageError,
    WrongIdentity,
)
from fedgrpc.metrics import Metrics
from fedgrpc.protocol.records import bounded_registration
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Cancel,
    CarryOver,
    Commit,
    Effect,
    Event,
    Failed,
    Finished,
    Offer,
    Progress,
    Rejected,
    Select,
    TaskPhase,
    WorkersAvailable,
)
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.state import step, time_left
from fedgrpc.rounds.version import Jump
from fedgrpc.rpc.identity import Session
from fedgrpc.storage.data_folder import DataFolder
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1.aggregator_pb2 import (
    RUN_PHASE_PAUSED,
    RUN_PHASE_RUNNING,
    RUN_PHASE_STOPPED,
    RegisterRequest,
    RunPhase,
)
from fedgrpc.v1.round_pb2 import Round as RoundRecord
from fedgrpc.v1.round_pb2 import TaskKind

log = structlog.get_logger()
T = TypeVar("T")
_ANONYMOUS = Session()


class Coordinator:
    """State of one run, and everything that workers and operators may do to it. Lives on one event loop."""

    def __init__(
        self,
        settings: AggregatorSettings,
        store: RunStore,
        models: ModelStore,
        journal: UploadJournal,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.instructions = TrainingInstructions.from_settings(settings)
        self.negotiation = settings.negotiation()
        self.store = store
        self.models = models
        self.local_models = LocalModels(settings.local_models, models, settings.data_dir / "channels.pb")
        self.journal = journal
        self.metrics = metrics
        self.clock = clock
        self.fleet = Fleet(settings.max_workers, settings.policy.lease_s)
        self.sessions = Sessions(self.fleet, settings.heartbeat_s, lambda: self.clock())
        self.evaluations = Evaluations()
        self.versions = Versions(settings.target, bool(settings.evaluators))
        self.rolling_back: RollBack | None = None
        self.makes_versions = True
        self.run = RunState(RUN_PHASE_RUNNING, time.time())
        self.current: CurrentRound | None = None
        self.last_record: RoundRecord | None = None
        self.effects: deque[Select | Commit | Finished] = deque()
        self.stopping = False
        self.wake = asyncio.Event()
        self.changes = Changes()
        self._waking = Waking()
        self._changing_phase = asyncio.Lock()
        self._registering = asyncio.Lock()
        # Who is about to be offered a task.
        self.chosen: frozenset[str] = frozenset()
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._log = log.bind(run=settings.run_name)
        self.data_folder = DataFolder(self._log, self.changes.notify)

    async def in_database(self, call: Callable[..., T], *args: object) -> T:
        """Run a method of `store` in its thread. Raises as it does."""
        return await asyncio.get_running_loop().run_in_executor(self._database, call, *args)

    def close(self) -> None:
        """Let the database go."""
        self._database.shutdown()
        self.models.close()
        self.store.close()

    @property
    def weighing(self) -> Weighing:
        """What the operator says of the weights of updates."""
        asked = self.instructions
        return Weighing(asked.worker_weights, asked.max_examples, bool(self.settings.leaves))

    # What workers do.

    async def register(self, registration: RegisterRequest, session: Session = _ANONYMOUS, peer: str = "") -> None:
        """Add or renew a worker, durably. Raises `UsageError`, `WrongIdentity`, `Exhausted` and `NameTaken`."""
        self.fleet.check(registration)
        registration = bounded_registration(registration)
        self.settings.roles.check(registration)
        self.negotiation.check(registration)
        await self.sessions.claim(registration.worker, session, peer)
        if not self.fleet.knows(registration, session):
            # After an outage a whole fleet comes back at once with nothing new to store. Registrations are stored
            # one at a time, so that what a round stores waits for one of them at most.
            async with self._registering:
                await self._save_worker(registration, session)
                # Another process may have been faster.
                await self.sessions.claim(registration.worker, session, peer)
                worker = self.fleet.register(registration, self.clock())
            self._log.info("worker registered", worker=worker.name, device=registration.device.device_class)
        else:
            worker = self.fleet.register(registration, self.clock())
        if self.sessions.take(worker, session, peer):
            self._abandon(worker)
        self.wake.set()

    async def _save_worker(self, registration: RegisterRequest, session: Session) -> None:
        """Store a registration, and make room for it where there is none. Raises `Exhausted`."""
        if (known := self.fleet.find(registration.worker)) is not None:
            known.changes = known.changes or Allowance()
            known.changes.take(self.clock())
        else:
            at_work = () if self.current is None else self.current.state.workers
            forgotten = self.fleet.make_room(registration.worker, {*at_work, *self.chosen}, self.clock())
            if forgotten:
                self._log.warning(
                    "workers forgotten", count=len(forgotten), reason="they never delivered an update"
                )
                await self.in_database(self.store.forget_workers, forgotten)
        await self.in_database(self.store.save_worker, registration, str(session))

    def _abandon(self, worker: Worker) -> None:
        """The device that had the worker's tasks is gone: whoever has its name now does not get them."""
        if task := self.evaluations.held_by(worker.name):
            self.evaluations.give_back(task)
        if worker.token is not None and self.wants(worker.token):
            self.dispatch(Failed(worker.token, "its device is gone, and another has its name", gone=True))
        worker.held = None

    async def poll(self, name: str, wait_s: float, held: tuple[int, bytes] | None = None) -> Assignment | None:
        """The worker's task, as soon as it has one; None after `wait_s`, and at once when the run has ended.

        Raises `UnknownWorker`, also for one that registered when this run had other encodings or named others.
        """
        worker = self.fleet.get(name)
        try:
            self.negotiation.check(worker.registration)
            self.settings.roles.check(worker.registration)
        except (UsageError, WrongIdentity) as error:
            raise UnknownWorker(f"register again: {error}") from error
        worker.heard(self.clock())
        worker.held = held
        self._drop_lost(worker)
        limit = asyncio.timeout(min(wait_s, self.settings.poll_wait_s))
        with self.fleet.polling(worker, limit):
            self.wake.set()
            try:
                async with limit:
                    # A poll that is challenged ends, for the caller to show that it is alive.
                    while not (self.run.ended or self.stopping or worker.holder.challenge):
                        worker.woken.clear()
                        if assignment := self._assignment(worker):
                            return assignment
                        await worker.woken.wait()
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                worker.holder.hung_up = worker.polls == 1
                raise
            finally:
                worker.last_seen = self.clock()
        worker.told_of_end = self.run.ended
        self.changes.notify()
        return None

    def release_calls(self) -> None:
        """The aggregator is about to end: open polls and watches return, so that nothing waits for them."""
        self.stopping = True
        self.fleet.wake_all()
        self.changes.notify()

    async def everyone_told(self) -> None:
        """Return once the run has ended and every worker that is alive knows."""
        seen = -1
        while self.fleet.still_unaware(self.clock()):
            seen = await self.changes.wait(seen)

    def _drop_lost(self, worker: Worker) -> None:
        """Who asks for a task has nothing to deliver; one of a version gone by is not worth beginning again."""
        token, current = worker.token, self.current
        if token is None or current is None or not takes_news(current.state, token):
            return
        if stale(current.state, token):
            self._log.info("carried task lost", round=current.state.number, worker=worker.name)
            self.dispatch(Failed(token, "its worker has lost it", gone=True))

    def _assignment(self, worker: Worker) -> Assignment | None:
        if worker.evaluator:
            task = self.evaluations.offer(worker.name, self.run.version if self.run.began else 0)
            return None if task is None else self._evaluation(task)
        current = self.current
        if worker.token is None or current is None or not takes_news(current.state, worker.token):
            return None
        phase = current.state.find(worker.token).phase
        if phase in (TaskPhase.OFFERED, TaskPhase.EXPIRED):
            phase = TaskPhase.OFFERED
        self.dispatch(Progress(worker.token, phase))
        return Assignment(
            worker.token,
            worker.name,
            current.state.number,
            current.kind,
            current.version_of(worker.token),
            self._seed(current.state.number, worker.name),
            time_left(current.state, self.clock()),
            current.local_task(worker.token),
            self.local_models.wants_channels,
        )

    def _evaluation(self, task: Evaluation) -> Assignment:
        number = self.current.state.number if self.current else 0
        return Assignment(task.token, task.worker, number, TaskKind.TASK_KIND_EVALUATE, task.version, 0, None)

    def _seed(self, number: int, worker: str) -> int:
        """32 bits: many generators, such as scikit-learn's, take no larger seed."""
        text = f"{self.instructions.seed}/{number}/{worker}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")

    async def heartbeat(self, name: str, token: str, phase: TaskPhase, fraction: float) -> Beat:
        """Extend a lease. Raises `UnknownTask` and `WrongIdentity`."""
        self.fleet.get(name).heard(self.clock())
        if self.evaluations.find(name, token):
            return Beat(cancel=False)
        try:
            if await self.check_open(name, token) is TaskPhase.ACCEPTED:
                # Its acknowledgement may be on the way: a worker told to stop would drop an update that counts.
                return Beat(cancel=False)
            self.dispatch(Progress(token, phase, fraction))
        except RoundClosed as error:
            return Beat(cancel=True, reason=str(error))
        assert self.current is not None
        state = self.current.state
        return Beat(cancel=False, time_left_s=None if stale(state, token) else time_left(state, self.clock()))

    async def check_open(self, name: str, token: str) -> TaskPhase:
        """The phase of a task that may still send or has sent its update.

        Raises `UnknownTask`, `WrongIdentity`, and `RoundClosed` when its update is not wanted any more. A task
        whose update was accepted stays accepted after its round: sending twice counts once.
        """
        current = self.current
        wanted = current is not None and takes_news(current.state, token)
        if current is not None and (wanted or token in current.state.tasks):
            task = current.state.find(token)
            worker, phase, reason = task.worker, task.phase, task.reason
        else:
            row = await self.in_database(self.store.task, token)
            if row is None:
                raise UnknownTask("no task has this token")
            worker, phase, reason = row.worker, row.phase, row.reason or "its round has ended"
            if not phase.final:
                phase = TaskPhase.LATE
        if worker != name:
            raise WrongIdentity("the token belongs to another worker")
        if phase in (TaskPhase.REJECTED, TaskPhase.FAILED, TaskPhase.LATE):
            raise RoundClosed(f"the task is {phase.name.lower()}: {reason}")
        if phase is not TaskPhase.ACCEPTED and current is not None and not wanted:
            raise RoundClosed(f"round {current.state.number} takes no more updates")
        return phase

    async def accepted_bytes(self, token: str) -> int:
        """Payload bytes of an update that was accepted; 0 where the record of its round has gone."""
        if self.current is not None and (report := self.current.reports.get(token)):
            return report.upload_bytes
        row = await self.in_database(self.store.task, token)
        record = None if row is None else await self.in_database(self.store.round, row.round)
        tasks = () if row is None or record is None else record.tasks
        return next((task.upload_bytes for task in tasks if row is not None and task.worker == row.worker), 0)

    def wants(self, token: str) -> bool:
        """Whether there is a use for an update of this task, as things stand."""
        return self.current is not None and takes_news(self.current.state, token)

    def accept(self, token: str, report: Report) -> None:
        """Count a durable update. Raises `RoundClosed` when it came too late."""
        current = self._with(token)
        worker = current.state.find(token).worker
        weight = self.weighing.weight_of(current.kind, worker, report, current.state.workers)
        self.dispatch(Accepted(token, weight))
        current.reports[token] = report
        self._log.info(
            "update accepted",
            round=current.state.number,
            worker=worker,
            examples=report.example_count,
            bytes=report.upload_bytes,
        )
        if report.unchanged:
            self._log.warning("training changed nothing", round=current.state.number, worker=worker)

    def reject(self, token: str, reason: str) -> None:
        """Record that an update was refused, for good."""
        current = self._with(token)
        worker = current.state.find(token).worker
        reason = claims.REASON.cleaned(reason)
        self._log.warning("update refused", round=current.state.number, worker=worker, reason=reason)
        self.dispatch(Rejected(token, reason))

    def leave_out(self, error: UnusableUpdate) -> None:
        """An update that was accepted cannot be averaged: it is rejected, and the round goes on without it."""
        current = self._with(error.token)
        worker, reason = current.state.find(error.token).worker, claims.REASON.cleaned(str(error))
        # What nobody raised on purpose is a fault of this program, too.
        surprise = None if isinstance(error.__cause__, FedgrpcError | None) else error.__cause__
        self._log.warning(
            "update left out", round=current.state.number, worker=worker, reason=reason, exc_info=surprise
        )
        self.dispatch(Rejected(error.token, reason))

    async def give_back(self, name: str, token: str, reason: str) -> None:
        """The worker cannot do its task. Idempotent. Raises `UnknownTask` and `WrongIdentity`."""
        reason = claims.REASON.cleaned(reason)
        if evaluation := self.evaluations.find(name, token):
            self.evaluations.give_back(evaluation)
            self._news()
        else:
            try:
                if await self.check_open(name, token) is TaskPhase.ACCEPTED:
                    return
                self.dispatch(Failed(token, reason))
            except RoundClosed:
                return
        # Only once it is known to be this worker's: a stranger would fill the log.
        self._log.warning("task given back", worker=name, reason=reason)

    def leave(self, name: str) -> None:
        """The worker ends: who waits for it looks again. Raises `UnknownWorker`."""
        worker = self.fleet.get(name)
        if not worker.left:
            self._log.info("worker left", worker=name)
        worker.left = True
        # It may have been told to end while the answer to its poll was on the way.
        self.take_back(name)
        self._news()

    def take_back(self, name: str) -> None:
        """A task goes to another when its worker has left and has not begun it. Raises `UnknownWorker`."""
        worker = self.fleet.get(name)
        if worker.left and worker.token is not None and self._not_begun(worker.token):
            self.dispatch(Failed(worker.token, "its worker has left", gone=True))

    def _not_begun(self, token: str) -> bool:
        current = self.current
        if current is None or not takes_news(current.state, token):
            return False
        return current.state.find(token).phase is TaskPhase.OFFERED

    async def score(self, task: Evaluation, metrics: dict[str, float], example_count: int) -> None:
        """Keep an evaluator's scores with the round that wrote the version."""
        mean = self.evaluations.score(task, metrics, example_count)
        told = for_log(mean, "worker", "version")
        self._log.info("version scored", worker=task.worker, version=task.version, **told)
        await self.keep_scores(task.version, evaluator=mean)
        self._news()

    async def keep_scores(
        self,
        version: int,
        workers: dict[str, float] | None = None,
        evaluator: dict[str, float] | None = None,
        of_sub_models: bool = False,
        not_finite: Sequence[str] = (),
    ) -> None:
        """Add scores of `version` to the record of the round that wrote it, and end the run if they will do.

        `of_sub_models`: those of the workers are of their sub-models of it. `not_finite`: names of others.
        Scores of evaluators that the operator has not named are shown, and nothing else.
        """
        self.metrics.observe_scores(workers or {}, "global")
        self.metrics.observe_scores(evaluator or {}, "evaluator")
        told = {**(workers or {}), **(evaluator or {})}
        jump = Jump.SCORES if self.versions.score_jumps(version, told) else Jump.NONE
        record = await self.in_database(
            self.store.add_scores, version, workers or {}, evaluator or {}, of_sub_models, not_finite, jump
        )
        for known in await self.in_database(self.store.versions, [version]):
            if version in self.versions:
                self.versions.add(known)
        if jump is not Jump.NONE:
            self._log.warning("scores are far worse than the best", version=version, scores=told)
        if record is None:
            return
        if self.last_record is not None and self.last_record.number == record.number:
            self.last_record = record
        target = self.settings.target
        trusted = {**(workers or {}), **((evaluator or {}) if self.settings.evaluators else {})}
        if target is not None and not self.run.ended and target.met(trusted):
            self.run.reason = f"version {version} has {target}"
        self.wake.set()
        self.changes.notify()

    def _with(self, token: str) -> CurrentRound:
        if self.current is None or token not in self.current.state.tasks:
            raise RoundClosed("the round of this task has ended")
        return self.current

    # What operators do.

    async def pause(self) -> None:
        """Open no further round. Raises `IllegalTransition` when the run has ended."""
        await self._set_phase(RUN_PHASE_PAUSED)

    async def pause_itself(self, reason: str) -> None:
        """Open no further round until an operator says so: it would end as the last ones did."""
        if not self.run.ended and self.run.phase != RUN_PHASE_PAUSED:
            await self._set_phase(RUN_PHASE_PAUSED, reason)
            self._log.error("the run has paused itself", reason=reason, hint="`fedgrpc resume` goes on")

    async def resume(self) -> None:
        """Open rounds again. Raises `IllegalTransition` when the run has ended."""
        await self._set_phase(RUN_PHASE_RUNNING)

    async def _set_phase(self, phase: RunPhase, paused_reason: str = "") -> None:
        async with self._changing_phase:
            if self.run.ended:
                raise IllegalTransition(f"the run has ended: {self.run.reason}")
            await self._store_run(phase, self.run.reason, paused_reason)
            self.run.phase, self.run.paused_reason = phase, paused_reason
        self._news()

    async def roll_back(self, version: int, reason: str) -> None:
        """Go on from a kept version, or (0) from a new first model; returns once that is durable.

        Raises `NotFound` when the version is not kept, `IllegalTransition`, and `StorageError`.
        """
        if self.run.ended:
            raise IllegalTransition(f"the run has ended: {self.run.reason}")
        if not self.makes_versions:
            raise IllegalTransition("versions are made by the parent of this aggregator: roll back there")
        if self.rolling_back is not None:
            raise IllegalTransition(f"the run is being rolled back to version {self.rolling_back.version} already")
        known = self.versions.get(version)
        if version and (known is None or not known.sha256):
            kept = ", ".join(map(str, self.versions))
            raise NotFound(f"model version {version} is not kept; kept are {kept or 'none'}")
        if not self.run.version:
            raise NotFound("there is no model version yet")
        self.rolling_back = asked = RollBack(version, reason, asyncio.get_running_loop().create_future())
        current = self.current
        if current is not None and current.state.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING):
            self.dispatch(Abort(asked.text))
        self._news()
        await asyncio.shield(asked.done)

    async def stop(self, reason: str) -> None:
        """End the run; the round in flight is abandoned, unless it is committing already. Idempotent."""
        reason = claims.REASON.cleaned(reason)
        if not self.run.ended:
            await self.end(RUN_PHASE_STOPPED, reason or "stopped by an operator")

    async def end(self, phase: RunPhase, reason: str) -> None:
        """Enter a final phase, durably, and then tell every worker that polls. The first end is the one."""
        async with self._changing_phase:
            if self.run.ended:
                return
            await self._store_run(phase, reason)
            self.run.phase, self.run.reason = phase, reason
            current = self.current
            if current is not None and current.state.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING):
                self.dispatch(Abort(reason))
        self._news()
        self.fleet.wake_all()

    async def save_run(self) -> None:
        """Make the run durable as it stands, and let everybody look."""
        await self._store_run(self.run.phase, self.run.reason, self.run.paused_reason)
        self._news()

    async def _store_run(self, phase: RunPhase, reason: str, paused_reason: str = "") -> None:
        """Before the phase is entered: nobody hears of one that a process that died might have forgotten."""
        run = self.run
        await self.in_database(
            self.store.save_run,
            run.id,
            self.settings.run_name,
            int(phase),
            reason,
            run.started_at,
            paused_reason,
        )

    def _news(self) -> None:
        self.wake.set()
        self.changes.notify()

    @property
    def round_number(self) -> int:
        """Of the round in progress, else of the last one; 0: there was none."""
        if self.current is not None:
            return self.current.state.number
        return 0 if self.last_record is None else self.last_record.number

    def record(self) -> RoundRecord | None:
        """The round in progress, else the last one."""
        if self.current is None:
            return self.last_record
        return self.current.record(self.clock())

    # What happens to the round.

    def dispatch(self, event: Event) -> None:
        """Apply one event to the round in progress. Raises as `rounds.step` does; nothing has then happened."""
        assert self.current is not None
        self.current.state, effects = step(self.current.state, event, self.clock())
        for effect in effects:
            self._carry_out(effect)
        if isinstance(event, Accepted | Rejected | Failed):
            self._release(event.token)
        if effects or isinstance(event, Accepted | Rejected | Failed):
            self.wake.set()
        self.changes.notify()

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Offer):
            offered = self.fleet.get(effect.worker)
            offered.token = effect.token
            self._waking.wake(offered.woken)
        elif isinstance(effect, Cancel):
            self._cancelled(effect)
        elif isinstance(effect, CarryOver):
            assert self.current is not None
            state = self.current.state
            worker = state.find(effect.token).worker
            self._log.info("task carried on", round=state.number, worker=worker, reason=effect.reason)
        elif isinstance(effect, Select | Commit | Finished):
            self.effects.append(effect)

    def _cancelled(self, cancel: Cancel) -> None:
        assert self.current is not None
        task = self.current.state.tasks[cancel.token]
        if task.phase.final:
            self._release(cancel.token)
        number = self.current.state.number
        self._log.info("task lost", round=number, worker=task.worker, reason=task.reason)

    def _release(self, token: str) -> None:
        assert self.current is not None
        worker = self.fleet.get(self.current.state.find(token).worker)
        if worker.token == token:
            worker.token = None

    def pool(self) -> WorkersAvailable:
        """Who could take a task of the round now."""
        left_out = self._left_out()
        return WorkersAvailable(self._idle_but(left_out), self.fleet.live_trainers(self.clock(), left_out))

    def _left_out(self) -> frozenset[str]:
        """Workers that held up rounds again and again, where the others are enough."""
        doubted = self.fleet.doubted(self.clock())
        if not doubted or self.fleet.live_trainers(self.clock(), doubted) < self.settings.policy.needed_idle:
            return frozenset()
        return doubted

    def idle_trainers(self) -> tuple[str, ...]:
        """Names of the idle trainers that may have a task of this kind of round."""
        return self._idle_but(self._left_out())

    def _idle_but(self, left_out: frozenset[str]) -> tuple[str, ...]:
        idle = self.fleet.idle_trainers()
        if left_out:
            idle = tuple(name for name in idle if name not in left_out)
        if self.current is None or self.current.kind != TaskKind.TASK_KIND_INITIALIZE:
            return idle
        return tuple(name for name in idle if self.settings.roles.initialises(name))

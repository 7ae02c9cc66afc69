"""The coordinator: the async shell of one run.

The rule: everything that the run knows is in its `RunMachine`, which only `apply` and `apply_after` change. Events
are applied at once, on the event loop, by whoever brings them. What takes time, selecting with its durable record
and committing, is done by one task (`fedgrpc.aggregator.driver`). What others hear of is stored first: a task
before it is offered, an update before it is accepted, a version before it is known.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.answers import Beat
from fedgrpc.aggregator.encoded_models import EncodedModels
from fedgrpc.aggregator.first_model_source import FirstModelSource
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.registry import Allowance, Worker, WorkerRegistry
from fedgrpc.aggregator.scores import for_log
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.training_instructions import TrainingInstructions
from fedgrpc.aggregator.wakeups import PacedWakeups
from fedgrpc.aio import Changes
from fedgrpc.errors import (
    FedgrpcError,
    RoundClosed,
    UnknownTask,
    UnknownWorker,
    UnusableUpdate,
    UsageError,
    WrongIdentity,
)
from fedgrpc.metrics import Metrics
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.protocol.rounds import RoundRecords
from fedgrpc.rounds.events import (
    Cancel,
    CarryOver,
    Commit,
    Failed,
    Finished,
    Offer,
    Progress,
    Rejected,
    Select,
    TaskPhase,
    WorkersAvailable,
)
from fedgrpc.rounds.round import RoundPhase, time_left
from fedgrpc.rounds.version import Jump, Measure
from fedgrpc.rpc.identity import Session
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.events import (
    DeviceReplaced,
    Drop,
    Effect,
    Ended,
    Ending,
    EndReason,
    Evaluated,
    EvaluatorPolled,
    Event,
    Paused,
    Resumed,
    RollBack,
    RollBackAsked,
    RunPhase,
    TargetMet,
    TaskClosed,
    UpdateAccepted,
    VersionKnown,
    WorkerLeft,
    WorkerPolled,
    WorkerTold,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.round_in_progress import check_ended_task
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.weights import Weighing
from fedgrpc.storage.data_folder import DataFolder
from fedgrpc.storage.run_store import RunStore, StoredRun
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.round_pb2 import Round as RoundRecord

log = structlog.get_logger()
T = TypeVar("T")
_ANONYMOUS = Session()
# After each new name is stored, this many times as long for what rounds store: a sync of the disk each.
_REGISTERING_REST = 3.0
# A disk that stalled once keeps no new device waiting.
_LONGEST_REST_S = 0.05
# After these the driver looks whether the round has something to do.
_FINAL = (UpdateAccepted, Rejected, Failed)
# Who only asks changes nothing that watchers see.
_QUIET = (WorkerPolled, EvaluatorPolled)


class Coordinator:
    """One run, and everything that workers and operators may do to it. Lives on one event loop."""

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
        self.encoded_models = EncodedModels(
            settings.data_dir,
            models,
            self.local_models.kept_channels,
            len(self.negotiation.downlinks),
            settings.max_chunk_bytes,
        )
        self.journal = journal
        self.metrics = metrics
        self.clock = clock
        self.fleet = WorkerRegistry(settings.max_workers, settings.policy.lease_s)
        self.first_model = FirstModelSource(self.fleet, settings.roles, lambda: self.clock())
        self.sessions = Sessions(self.fleet, settings.heartbeat_s, lambda: self.clock())
        self.machine = RunMachine(_rules(settings, self.first_model.may_give), secrets.token_hex(8), time.time())
        self.last_record: RoundRecord | None = None
        # What the driver is to carry out, in this order.
        self.effects: deque[Select | Commit | Finished | Drop] = deque()
        self.stopping = False
        self.wake = asyncio.Event()
        self.changes = Changes()
        # Who is about to be offered a task.
        self.chosen: frozenset[str] = frozenset()
        self._records = RoundRecords()
        self._wakeups = PacedWakeups()
        self._task_closed: list[Callable[[str, str], None]] = []
        self._rolled_back: asyncio.Future[None] | None = None
        self._changing_phase = asyncio.Lock()
        self._registering = asyncio.Lock()
        self._registering_rests_until = 0.0
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._log = log.bind(run=settings.run_name)
        self.data_folder = DataFolder(self._log, self.changes.notify)

    async def in_database(self, call: Callable[..., T], *args: object) -> T:
        """Run a method of `store` in its thread. Raises as it does."""
        return await asyncio.get_running_loop().run_in_executor(self._database, call, *args)

    def close(self) -> None:
        """Let the database go."""
        self._database.shutdown()
        self.encoded_models.close()
        self.store.close()

    @property
    def weighing(self) -> Weighing:
        """How the updates of this run count, by its operator and its parent."""
        asked, settings = self.instructions, self.settings
        return Weighing(
            asked.worker_weights,
            asked.max_examples,
            settings.leaves_named,
            settings.policy.max_share,
            # The mean of a leaf travels as one update.
            None if self.machine.makes_versions else claims.WEIGHT.most,
            asked.plan,
            asked.normalize_steps,
            asked.clip_norm,
            settings.staleness_exponent,
            # A bound on norms is none on buffers, which are values and no differences.
            asked.clip_norm is not None or settings.max_update_norm is not None,
        )

    # The run.

    def apply(self, event: Event) -> None:
        """Apply one event to the run. Raises as `RunMachine.apply`; nothing has then happened."""
        effects = self.machine.apply(event, self.clock())
        for effect in effects:
            self._carry_out(effect)
        if effects or isinstance(event, _FINAL):
            self.wake.set()
        if effects or not isinstance(event, _QUIET):
            self.changes.notify()

    async def apply_after(self, event: Event, store: Callable[[RunMachine], Awaitable[None]]) -> None:
        """Store the run as the event will leave it, and then apply the event. Raises as `apply`, and as `store`.

        Nothing is waited for in between, or a second try would store it twice.
        """
        await store(self.machine.foresee(event, self.clock()))
        self.apply(event)

    def on_task_closed(self, call: Callable[[str, str], None]) -> None:
        """Call `call(token, reason)` whenever no update of a task is wanted any more."""
        self._task_closed.append(call)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Offer(worker=name):
                self._wakeups.wake(self.fleet.get(name).woken)
            case TaskClosed(token, reason):
                for call in self._task_closed:
                    call(token, reason)
            case Cancel(token):
                self._log_task("task lost", token)
            case CarryOver(token):
                self._log_task("task carried over", token)
            case Select() | Commit() | Finished() | Drop():
                self.effects.append(effect)

    def _log_task(self, event: str, token: str) -> None:
        state = self.machine.current.state
        task = state.tasks[token]
        self._log.info(event, round=state.number, worker=task.worker, reason=task.reason)

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
                await self._rest_from_registering()
                began = time.monotonic()
                await self._save_worker(registration, session)
                now = time.monotonic()
                self._registering_rests_until = now + min(_LONGEST_REST_S, _REGISTERING_REST * (now - began))
                # Another process may have been faster.
                await self.sessions.claim(registration.worker, session, peer)
                worker = self.fleet.register(registration, self.clock())
            self._log.info("worker registered", worker=worker.name, device=registration.device.device_class)
        else:
            worker = self.fleet.register(registration, self.clock())
        if self.sessions.take(worker, session, peer):
            self.apply(DeviceReplaced(worker.name))
        self.wake.set()

    @property
    def asks_channels(self) -> bool:
        """Whether workers that register are to tell the channels of the model."""
        # The plans of a leaf come with its parent's tasks, when it is too late to ask.
        leads_for_a_parent = not self.machine.makes_versions and self.local_models.channels is None
        return self.local_models.wants_channels or leads_for_a_parent

    async def describe(self, name: str, description: ModelDescription) -> None:
        """Keep what a worker says of the model. Raises `UnknownWorker` and `StorageError`."""
        worker = self.fleet.get(name)
        worker.heard(self.clock())
        worker.description = replace(description, channels=None)
        if description.channels is not None:
            await asyncio.to_thread(self.local_models.learn, description.channels, self.machine.layout)
        if not self.machine.began:
            self.first_model.tell_lacking()
        self.wake.set()

    async def _rest_from_registering(self) -> None:
        """Wait until a crowd of new names has left the disk to the rounds for a while."""
        await asyncio.sleep(max(0.0, self._registering_rests_until - time.monotonic()))

    async def _save_worker(self, registration: RegisterRequest, session: Session) -> None:
        """Store a registration, and make room for it where there is none. Raises `Exhausted`."""
        if (known := self.fleet.find(registration.worker)) is not None:
            known.changes = known.changes or Allowance()
            known.changes.take(self.clock())
        else:
            run = self.machine
            at_work = () if run.round is None else run.round.state.workers
            keep = {*at_work, *self.chosen, *run.leases}
            forgotten = self.fleet.make_room(registration.worker, keep, self.clock())
            if forgotten:
                self._log.warning(
                    "workers forgotten", count=len(forgotten), reason="they never delivered an update"
                )
                await self.in_database(self.store.forget_workers, forgotten)
        await self.in_database(self.store.save_worker, registration, str(session))

    async def poll(
        self,
        name: str,
        wait_s: float,
        held: tuple[int, bytes] | None = None,
        new_examples: int | None = None,
    ) -> str | None:
        """The token of the worker's task, as soon as it has one; None after `wait_s`, and once the run has ended.

        Raises `UnknownWorker`, also for one that registered when this run had other encodings or named others.
        """
        worker = self.fleet.get(name)
        try:
            self.negotiation.check(worker.registration)
            self.settings.roles.check(worker.registration)
        except (UsageError, WrongIdentity) as error:
            raise UnknownWorker(f"register again: {error}") from error
        worker.heard(self.clock())
        self.apply(WorkerPolled(name, held, new_examples))
        limit = asyncio.timeout(min(wait_s, self.settings.poll_wait_s))
        with self.fleet.polling(worker, limit):
            self.wake.set()
            try:
                async with limit:
                    # A poll that is challenged ends, for the caller to show that it is alive.
                    while not (self.machine.ended or self.stopping or worker.holder.challenge):
                        worker.woken.clear()
                        if token := self._token_for(worker):
                            return token
                        await worker.woken.wait()
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                worker.holder.hung_up = worker.polls == 1
                raise
            finally:
                worker.last_seen = self.clock()
        self.apply(WorkerTold(name))
        return None

    def release_calls(self) -> None:
        """The aggregator is about to end: open polls and watches return, so that nothing waits for them."""
        self.stopping = True
        self.fleet.wake_all()
        self.changes.notify()

    async def everyone_told(self) -> None:
        """Return once the run has ended and every worker that is alive knows."""
        seen = -1
        while self.fleet.any_alive_but(self.machine.told, self.clock()):
            seen = await self.changes.wait(seen)

    def _token_for(self, worker: Worker) -> str | None:
        """The task of a worker that polls; an expired one is its own again."""
        run = self.machine
        if worker.evaluator:
            self.apply(EvaluatorPolled(worker.name, secrets.token_urlsafe(18)))
            evaluation = run.evaluation_of(worker.name)
            return None if evaluation is None else evaluation.token
        token = run.task_of(worker.name)
        if token is not None:
            phase = run.current.state.find(token).phase
            self.apply(Progress(token, TaskPhase.OFFERED if phase is TaskPhase.EXPIRED else phase))
        return token

    async def heartbeat(self, name: str, token: str, phase: TaskPhase, fraction: float) -> Beat:
        """Extend a lease. Raises `UnknownTask` and `WrongIdentity`."""
        self.fleet.get(name).heard(self.clock())
        run = self.machine
        if run.evaluations.find(name, token):
            return Beat(cancel=False)
        try:
            if await self.check_open(name, token) is TaskPhase.ACCEPTED:
                # Its acknowledgement may be on the way: a worker told to stop would drop an update that counts.
                return Beat(cancel=False)
            self.apply(Progress(token, phase, fraction))
        except RoundClosed as error:
            return Beat(cancel=True, reason=str(error))
        stale = run.current.is_stale(token)
        return Beat(cancel=False, time_left_s=None if stale else time_left(run.current.state, self.clock()))

    async def check_open(self, name: str, token: str) -> TaskPhase:
        """The phase of a task that may still send or has sent its update.

        Raises `UnknownTask`, `WrongIdentity`, and `RoundClosed` when its update is not wanted any more. A task
        whose update was accepted stays accepted after its round: sending twice counts once.
        """
        round_ = self.machine.round
        if round_ is not None and token in round_:
            return round_.check_task(name, token)
        row = await self.in_database(self.store.task, token)
        if row is None:
            raise UnknownTask("no task has this token")
        return check_ended_task(name, row.worker, row.phase, row.reason)

    async def accepted_bytes(self, token: str) -> int:
        """Payload bytes of an update that was accepted; 0 where the record of its round has gone."""
        round_ = self.machine.round
        if round_ is not None and (report := round_.context(token).report) is not None:
            return report.upload_bytes
        row = await self.in_database(self.store.task, token)
        record = None if row is None else await self.in_database(self.store.round, row.round)
        tasks = () if row is None or record is None else record.tasks
        return next((task.upload_bytes for task in tasks if row is not None and task.worker == row.worker), 0)

    def reject(self, token: str, reason: str) -> None:
        """Record that an update was refused, for good."""
        round_, reason = self.machine.round_of(token), claims.REASON.cleaned(reason)
        self._log.warning("update refused", round=round_.number, worker=round_.worker_of(token), reason=reason)
        self.apply(Rejected(token, reason))

    def leave_out(self, error: UnusableUpdate) -> None:
        """An update that was accepted cannot be averaged: it is rejected, and the round goes on without it."""
        round_ = self.machine.round_of(error.token)
        worker, reason = round_.worker_of(error.token), claims.REASON.cleaned(str(error))
        # What nobody raised on purpose is a fault of this program, too.
        surprise = None if isinstance(error.__cause__, FedgrpcError | None) else error.__cause__
        self._log.warning("update left out", round=round_.number, worker=worker, reason=reason, exc_info=surprise)
        self.apply(Rejected(error.token, reason))

    async def give_back(self, name: str, token: str, reason: str) -> None:
        """The worker cannot do its task. Idempotent. Raises `UnknownTask` and `WrongIdentity`."""
        reason = claims.REASON.cleaned(reason)
        if evaluation := self.machine.evaluations.find(name, token):
            self.apply(Evaluated(evaluation, None))
            self._news()
        else:
            try:
                if await self.check_open(name, token) is TaskPhase.ACCEPTED:
                    return
                self.apply(Failed(token, reason))
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
        if self.fleet.get(name).left:
            self.apply(WorkerLeft(name))

    def put_out(self, name: str, why: str, drop_updates: bool) -> None:
        """Do without a worker that may call no more; with `drop_updates` its accepted updates do not count.

        An update of a round that is committing counts: it is in the mean already.
        """
        if self.fleet.find(name) is None:
            return
        if (token := self.machine.task_of(name)) is not None:
            self.apply(Failed(token, why))
        self.leave(name)
        round_ = self.machine.round
        if round_ is None or not drop_updates:
            return
        if round_.state.phase is RoundPhase.COMMITTING:
            self._log.warning("updates not dropped", worker=name, reason=f"round {round_.number} is committing")
            return
        tasks = round_.state.tasks.items()
        dropped = [token for token, task in tasks if task.worker == name and task.phase is TaskPhase.ACCEPTED]
        # The file first: after a restart it would count again.
        self.journal.discard(dropped)
        for token in dropped:
            self.apply(Rejected(token, why, withdrawn=True))
            self._log.warning("update dropped", worker=name, round=round_.number, reason=why)

    async def score(self, task: Evaluation, metrics: dict[str, float], example_count: int) -> None:
        """Keep an evaluator's scores with the round that wrote the version."""
        self.apply(Evaluated(task, metrics, example_count))
        found = self.machine.evaluations.scores_of(task.version)
        mean = metrics if found is None else found[1]
        told = for_log(mean, "worker", "version")
        self._log.info("version scored", worker=task.worker, version=task.version, **told)
        await self.keep_scores(task.version, evaluator=mean)
        self._news()

    async def keep_scores(
        self,
        version: int,
        workers: Mapping[str, float] | None = None,
        evaluator: Mapping[str, float] | None = None,
        of_sub_models: bool = False,
        not_finite: Sequence[str] = (),
    ) -> None:
        """Add scores of `version` to the record of the round that wrote it, and end the run if they will do.

        `of_sub_models`: those of the workers are of their sub-models of it. `not_finite`: names of others.
        Scores of evaluators that the operator has not named are shown, and nothing else.
        """
        versions = self.machine.versions
        self.metrics.observe_scores(workers or {}, "global")
        self.metrics.observe_scores(evaluator or {}, "evaluator")
        told = {**(workers or {}), **(evaluator or {})}
        jump = Jump.SCORES if versions.score_jumps(version, told) else Jump.NONE
        record = await self.in_database(
            self.store.add_scores, version, workers or {}, evaluator or {}, of_sub_models, not_finite, jump
        )
        for known in await self.in_database(self.store.versions, [version]):
            if version in versions:
                self.apply(VersionKnown(known))
        if jump is not Jump.NONE:
            self._log.warning("scores are far worse than the best", version=version, scores=told)
        if record is None:
            return
        if self.last_record is not None and self.last_record.number == record.number:
            self.last_record = record
        target = self.settings.target
        trusted = {**(workers or {}), **((evaluator or {}) if self.settings.evaluators_named else {})}
        if target is not None and target.met(trusted):
            self.apply(TargetMet(f"version {version} has {target}"))
        self._news()

    # What operators do.

    async def pause(self) -> None:
        """Open no further round. Raises `IllegalTransition` when the run has ended."""
        await self._set_phase(Paused())

    async def pause_itself(self, reason: str) -> None:
        """Open no further round until an operator says so: it would end as the last ones did."""
        if not self.machine.ended and self.machine.phase is not RunPhase.PAUSED:
            await self._set_phase(Paused(reason))
            self._log.error("the run has paused itself", reason=reason, hint="`fedgrpc resume` goes on")

    async def resume(self) -> None:
        """Open rounds again. Raises `IllegalTransition` when the run has ended."""
        await self._set_phase(Resumed())

    async def _set_phase(self, event: Paused | Resumed | Ended) -> None:
        """Enter a phase once it is stored: nobody hears of one that a process that died might have forgotten."""
        async with self._changing_phase:
            await self.apply_after(event, self._store_run)
        self._news()

    async def roll_back(self, version: int, reason: str) -> None:
        """Go on from a kept version, or (0) from a new first model; returns once that is durable.

        Raises `NotFound` when the version is not kept, `IllegalTransition`, and `StorageError`.
        """
        self.apply(RollBackAsked(RollBack(version, reason)))
        self._rolled_back = done = asyncio.get_running_loop().create_future()
        self._news()
        await asyncio.shield(done)

    def answer_roll_back(self, error: Exception | None = None) -> None:
        """Tell the operator that the rollback is durable, or why it is not."""
        if self._rolled_back is None or self._rolled_back.done():
            return
        if error is None:
            self._rolled_back.set_result(None)
        else:
            self._rolled_back.set_exception(error)

    async def stop(self, reason: str) -> None:
        """End the run; the round in flight is abandoned, unless it is committing already. Idempotent."""
        text = claims.REASON.cleaned(reason) or "stopped by an operator"
        await self.end(RunPhase.STOPPED, Ending(EndReason.STOPPED, text))

    async def end(self, phase: RunPhase, ending: Ending) -> None:
        """Enter a final phase, durably, and then tell every worker that polls. The first end is the one."""
        if self.machine.ended:
            return
        await self._set_phase(Ended(phase, ending))
        self.fleet.wake_all()

    async def save_run(self) -> None:
        """Make the run durable as it stands, and let everybody look."""
        await self._store_run(self.machine)
        self._news()

    async def _store_run(self, run: RunMachine) -> None:
        stored = StoredRun(
            run.id,
            self.settings.run_name,
            run.phase,
            run.ending.reason,
            run.ending.text,
            run.started_at,
            run.paused_reason,
        )
        await self.in_database(self.store.save_run, stored)

    def _news(self) -> None:
        self.wake.set()
        self.changes.notify()

    @property
    def round_number(self) -> int:
        """Of the round in progress, else of the last one; 0: there was none."""
        if self.machine.round is not None:
            return self.machine.round.number
        return 0 if self.last_record is None else self.last_record.number

    def record(self) -> RoundRecord | None:
        """The round in progress, else the last one."""
        if self.machine.round is None:
            return self.last_record
        return self._records.record(self.machine.round, self.clock())

    def workers_available(self) -> WorkersAvailable:
        """Who could take a task of the round now."""
        return self.machine.workers_available(self.fleet, self.clock())


def _rules(settings: AggregatorSettings, initialises: Callable[[str], bool]) -> RunRules:
    target = settings.target
    return RunRules(
        settings.policy,
        settings.rounds,
        settings.evaluate,
        measures=() if target is None else (Measure(target.name, target.at_least),),
        evaluators_named=settings.evaluators_named,
        initialises=initialises,
    )

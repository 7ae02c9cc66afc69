"""The coordinator: the async shell of one run.

    fedgrpc.aggregator.worker_calls     registering, polling, heartbeats
    fedgrpc.aggregator.receiver         updates
    fedgrpc.aggregator.driver           rounds
    fedgrpc.aggregator.version_scores   scores of versions

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
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.encoded_models import EncodedModels
from fedgrpc.aggregator.first_model import FirstModelSource
from fedgrpc.aggregator.histories import RunWorkers
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.recorded_rounds import RecordedRounds
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.training_instructions import TrainingInstructions
from fedgrpc.aio import Changes
from fedgrpc.errors import UnknownTask
from fedgrpc.identity.roles import EVALUATORS
from fedgrpc.metrics import Metrics
from fedgrpc.rounds.events import (
    Cancel,
    CarryOver,
    Commit,
    Failed,
    Finished,
    Offer,
    Rejected,
    Select,
    TaskPhase,
    WorkersAvailable,
)
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.version import Measure
from fedgrpc.runs.events import (
    Drop,
    Effect,
    Ended,
    Ending,
    EndReason,
    EvaluatorPolled,
    Event,
    Paused,
    Resumed,
    RollBack,
    RollBackAsked,
    RunPhase,
    TaskClosed,
    UpdateAccepted,
    WorkerLeft,
    WorkerPolled,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Weighing
from fedgrpc.runs.round_in_progress import check_ended_task
from fedgrpc.runs.rules import RunRules
from fedgrpc.storage.data_folder import DataFolder
from fedgrpc.storage.run_store import RunStore, StoredRun
from fedgrpc.storage.uploads import UploadJournal

log = structlog.get_logger()
T = TypeVar("T")
# After these the driver looks whether the round has something to do.
_FINAL = (UpdateAccepted, Rejected, Failed)
# Who only asks changes nothing that watchers see.
_QUIET = (WorkerPolled, EvaluatorPolled)


class Coordinator:
    """One run: its machine and collaborators, and what operators may do to it. Lives on one event loop."""

    def __init__(
        self,
        settings: AggregatorSettings,
        fleet: WorkerRegistry,
        store: RunStore,
        models: ModelStore,
        journal: UploadJournal,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fleet` belongs to the process, not to the run. `clock` never runs backwards, seconds."""
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
        self.fleet = fleet
        self.workers = RunWorkers(fleet)
        self.first_model = FirstModelSource(fleet, self.workers, settings.roles, clock)
        self.machine = RunMachine(_rules(settings, self.first_model.may_give), secrets.token_hex(8), time.time())
        self.records = RecordedRounds(store, self.in_database, self.workers)
        # What the driver is to carry out, in this order.
        self.effects: deque[Select | Commit | Finished | Drop] = deque()
        self.stopping = False
        self.wake = asyncio.Event()
        self.changes = Changes()
        self._task_closed: list[Callable[[str, str], None]] = []
        self._rolled_back: asyncio.Future[None] | None = None
        self._changing_phase = asyncio.Lock()
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
        """Weights of this run's updates, as its operator and its parent want them."""
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
            asked.noise_weights,
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
                self.fleet.wake(name)
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

    # Tasks and workers.

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

    def reject(self, token: str, reason: str) -> None:
        """Record that an update was refused, for good."""
        round_, reason = self.machine.round_of(token), claims.REASON.cleaned(reason)
        self._log.warning("update refused", round=round_.number, worker=round_.worker_of(token), reason=reason)
        self.apply(Rejected(token, reason))

    def leave(self, name: str) -> None:
        """The worker ends: who waits for it looks again. Raises `UnknownWorker`."""
        worker = self.fleet.get(name)
        if not worker.left:
            self._log.info("worker left", worker=name)
        worker.left = True
        # It may have been told to end while the answer to its poll was on the way.
        self.take_back(name)
        self.news()

    def take_back(self, name: str) -> None:
        """A task goes to another when its worker has left and has not begun it. Raises `UnknownWorker`."""
        if self.fleet.get(name).left:
            self.apply(WorkerLeft(name))

    def put_out(self, name: str, why: str, drop_updates: bool) -> None:
        """Do without a worker that may call no more; with `drop_updates` its accepted updates do not count.

        An update of a round that is committing counts: it is in the mean already.
        """
        # Evaluators speak through their leaf.
        for worker in (name, name + EVALUATORS):
            if self.fleet.find(worker) is None:
                continue
            if (token := self.machine.task_of(worker)) is not None:
                self.apply(Failed(token, why))
            self.leave(worker)
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

    # What operators do.

    async def pause(self) -> None:
        """Open no further round. Raises `IllegalTransition` when the run has ended."""
        await self._set_phase(Paused())

    async def pause_itself(self, reason: str) -> None:
        """Open no further round until an operator says so: it would end as the last ones did."""
        if not self.machine.ended and self.machine.phase is not RunPhase.PAUSED:
            await self._set_phase(Paused(reason))
            self._log.error("the run has paused itself", reason=reason, hint="`fedgrpc resume` continues it")

    async def resume(self) -> None:
        """Open rounds again. Raises `IllegalTransition` when the run has ended."""
        await self._set_phase(Resumed())

    async def _set_phase(self, event: Paused | Resumed | Ended) -> None:
        """Enter a phase once it is stored: no peer learns of one that a process that dies could forget."""
        async with self._changing_phase:
            await self.apply_after(event, self._store_run)
        self.news()

    async def roll_back(self, version: int, reason: str) -> None:
        """Go on from a kept version, or (0) from a new first model; returns once that is durable.

        Raises `NotFound` when the version is not kept, `IllegalTransition`, and `StorageError`.
        """
        self.apply(RollBackAsked(RollBack(version, reason)))
        self._rolled_back = done = asyncio.get_running_loop().create_future()
        self.news()
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
        self.news()

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

    def news(self) -> None:
        """Let the driver and all watchers look."""
        self.wake.set()
        self.changes.notify()

    def workers_available(self) -> WorkersAvailable:
        """Count the workers that could take a task of the round now."""
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

"""The coordinator of one run: its shell, its collaborators, and what operators may do to it.

    fedgrpc.aggregator.run_shell        the run's machine and its database
    fedgrpc.aggregator.worker_calls     registering, polling, heartbeats
    fedgrpc.aggregator.receiver         updates on their way in
    fedgrpc.aggregator.acceptance       updates that are here whole
    fedgrpc.aggregator.driver           rounds
    fedgrpc.aggregator.round_records    records of rounds, scores of versions

The rule: what takes time, selecting with its durable record and committing, is done by one task
(`fedgrpc.aggregator.driver`). An operator's call is answered once its effect is durable.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Protocol

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.changed_settings import settings_text
from fedgrpc.aggregator.encoded_models import EncodedModels
from fedgrpc.aggregator.first_model import FirstModelSource
from fedgrpc.aggregator.histories import RunWorkers
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.private_releases import PrivateReleases
from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.aggregator.round_records import RecordedRounds, VersionScores
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.secure_sums import SecureSums
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.task_terms import TaskTerms
from fedgrpc.aggregator.update_checks import ExpectedUpdate
from fedgrpc.codec.manifest import Limits
from fedgrpc.identity.roles import EVALUATORS
from fedgrpc.metrics import Metrics
from fedgrpc.rounds.events import (
    Failed,
    Rejected,
    TaskPhase,
    WorkersAvailable,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.version import Measure
from fedgrpc.runs.events import (
    Ended,
    Ending,
    EndReason,
    Paused,
    Resumed,
    RollBack,
    RollBackAsked,
    RunPhase,
    WorkerLeft,
)
from fedgrpc.runs.fleet import FleetView
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.weighing import Weighing
from fedgrpc.storage.data_folder import DataFolder
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.task_rows import RunRow
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.tracking.tracker import tracker_of
from fedgrpc.tracking.tracking import Tracking

log = structlog.get_logger()


class RunCandidates(FleetView, Protocol):
    """Questions of a run to the fleet, and its evaluators."""

    def live_evaluators(self, now: float) -> list[Worker]:
        """The evaluators that are alive."""

    def reserving(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Give none of these workers to anybody else, and forget none, while the block runs."""


class Coordinator(RunShell):
    """The shell of a run with its collaborators. Lives on one event loop."""

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
        self.workers = RunWorkers(fleet)
        self.first_model = FirstModelSource(fleet, self.workers, settings.roles, clock)
        machine = RunMachine(_rules(settings, self.first_model.may_give), secrets.token_hex(8), time.time())
        super().__init__(machine, fleet, store, settings.run_name, clock)
        self.settings = settings
        self.negotiation = settings.negotiation()
        self.models = models
        self.journal = journal
        self.metrics = metrics
        self.local_models = LocalModels(settings.local_models, models, settings.data_dir / "channels.pb")
        self.encoded_models = EncodedModels(
            settings.data_dir,
            models,
            self.local_models.kept_channels,
            len(self.negotiation.downlinks),
            settings.max_chunk_bytes,
        )
        self.terms = TaskTerms(settings, machine, fleet, self.workers, self.negotiation, self.local_models, clock)
        self.tracking = Tracking([tracker_of(text) for text in settings.track])
        self.tracking.begin(settings.run_name, settings_text(settings))
        self.records = RecordedRounds(store, self.in_database, self.workers, self.tracking)
        self.scores = VersionScores(self, self.records, settings, metrics)
        self.releases = PrivateReleases(self, settings)
        self.secure_sums = SecureSums(self, settings, models, self.encoded_models, self.terms)
        self.data_folder = DataFolder(self._log, self.changes.notify)
        self.stopping = False
        # The fleet as this run may use it: all of it, unless other runs share it.
        self.candidates: RunCandidates = fleet
        # Versions beside the last and the best ones that are not let go: by a tag, or by a release.
        self.named_versions: Callable[[], frozenset[int]] = frozenset
        self._rolled_back: asyncio.Future[None] | None = None
        self._changing_phase = asyncio.Lock()

    def close(self) -> None:
        """Let the database go, and begin no further encoding."""
        super().close()
        self.encoded_models.close()
        self.tracking.end()

    @property
    def weighing(self) -> Weighing:
        """Weights of this run's updates, as its operator and its parent want them."""
        asked, settings = self.terms.instructions, self.settings
        return Weighing(
            asked.worker_weights,
            asked.max_examples,
            settings.leaves_named,
            settings.policy.max_share,
            # The mean of a leaf travels as one update.
            None if self.machine.makes_versions else claims.WEIGHT.most,
            asked.plan,
            self.machine.clip_norm or asked.clip_norm,
            settings.staleness_exponent,
            # A bound on norms is none on buffers, which are values and no differences.
            bool(asked.clip_norm or settings.clip_quantile or settings.max_update_norm),
            asked.noise_weights,
            # With privacy it is of the ledger, which has the clip norm that follows.
            None if settings.privacy.on else settings.clip_quantile,
            settings.privacy.cohort,
        )

    def expected_update(self, worker: str, token: str) -> ExpectedUpdate:
        """Return what a task of the round in progress asks of its update, whatever becomes of its round."""
        round_, settings = self.machine.current, self.settings
        local, kept = round_.local_task(token), None
        if round_.kind is TaskKind.TRAIN and not local.plain:
            kept = self.local_models.kept_channels(local.sub_model, round_.version_of(token))
        limits = Limits(max_payload_bytes=settings.max_payload_bytes, max_content_bytes=settings.max_payload_bytes)
        return ExpectedUpdate(
            round_.kind,
            self.machine.layout,
            local,
            kept,
            self.fleet.get(worker).leads,
            limits,
            settings.admission,
            settings.max_model_bytes,
            self.weighing,
            self.secure_sums.expected_words(round_, worker),
            settings.sums_at_leaves,
        )

    # Tasks and workers.

    def release_calls(self) -> None:
        """End open polls and watches: the aggregator is about to end, and nothing waits for them."""
        self.stopping = True
        self.fleet.wake_all()
        self.changes.notify()

    async def everyone_told(self) -> None:
        """Return once the run has ended and every worker that is alive knows."""
        seen = -1
        while self.fleet.any_alive_but(self.machine.told, self.clock()):
            seen = await self.changes.wait(seen)

    def leave(self, name: str) -> None:
        """Note that a worker ends, and look again at all that waits for it. Raises `UnknownWorker`."""
        worker = self.fleet.get(name)
        if not worker.left:
            self._log.info("worker left", worker=name)
        worker.left = True
        # It may have been told to end while the answer to its poll was on the way.
        self.take_back(name)
        self.news()

    def take_back(self, name: str) -> None:
        """Give the task of a worker that has left to another, unless it was begun. Raises `UnknownWorker`."""
        if self.fleet.get(name).left:
            self.apply(WorkerLeft(name))

    def put_out(self, name: str, why: str, drop_updates: bool) -> None:
        """Do without a worker that may call no more. With `drop_updates` its accepted updates do not count.

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
        """Continue from a kept version, or (0) from a new first model. Return once that is durable.

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
        """End the run. The round in progress is abandoned, unless it is committing already. Idempotent."""
        text = claims.REASON.cleaned(reason) or "stopped by an operator"
        await self.end(RunPhase.STOPPED, Ending(EndReason.STOPPED, text))

    async def end(self, phase: RunPhase, ending: Ending) -> None:
        """Enter a final phase, durably, and then tell every worker that polls. The first end counts."""
        if self.machine.ended:
            return
        await self._set_phase(Ended(phase, ending))
        self.fleet.wake_all()

    async def save_run(self) -> None:
        """Make the run durable as it stands, and let everybody look."""
        await self._store_run(self.machine)
        self.news()

    async def _store_run(self, run: RunMachine) -> None:
        stored = RunRow(
            run.id,
            self.settings.run_name,
            run.phase,
            run.ending.reason,
            run.ending.text,
            run.started_at,
            run.paused_reason,
        )
        await self.in_database(self.store.save_run, stored)

    def workers_available(self) -> WorkersAvailable:
        """Count the workers that could take a task of the round now."""
        return self.machine.workers_available(self.candidates, self.clock())


def _rules(settings: AggregatorSettings, initialises: Callable[[str], bool]) -> RunRules:
    target = settings.target
    return RunRules(
        settings.policy,
        settings.rounds,
        settings.evaluate,
        measures=() if target is None else (Measure(target.name, target.at_least),),
        evaluators_named=settings.evaluators_named,
        initialises=initialises,
        secure=settings.sums_here,
    )

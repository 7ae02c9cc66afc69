"""The links of a leaf to its parent: worker loops whose local work is done by the leaf's own workers.

    RoundWork      a round: takes tasks while there are enough workers, and sends the mean of their updates
    ScoringWork    a second link, of an evaluator: sends the scores of the leaf's evaluators

The second link starts once the leaf has an evaluator, and asks for a version to score while it has one. It holds
no round: the scores of a version are sent when all live evaluators have reported theirs.

The rule: the end of the process gives no task back. The task and its round are on the disk, and the next process
continues them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.errors import FedgrpcError, TaskError
from fedgrpc.hierarchy.handoff import ParentTask, VersionToScore
from fedgrpc.hierarchy.leaf_run import LeafRun, LeafRuns
from fedgrpc.hierarchy.partial_aggregate import sending
from fedgrpc.identity.roles import EVALUATORS
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import Activity, Status
from fedgrpc.protocol.tasks import Registration, Task, WorkerRole
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rpc.identity import Session
from fedgrpc.trainer import EvalResult
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.caller import Report
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.device import detect
from fedgrpc.worker.enrolment import WorkerLink
from fedgrpc.worker.local_work import LocalWork, TaskFiles
from fedgrpc.worker.loop import Loop
from fedgrpc.worker.membership import leave
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import Fill, SpooledUpdate
from fedgrpc.worker.status import Controls, StatusPublisher
from fedgrpc.worker.trainer_calls import ALL_PARTS
from fedgrpc.worker.update import Began, Outcome, update_of

# Share of the time left that is reserved for the task's own upload, or this multiple of what the last one took.
_RESERVED: Final = 0.1
_LAST_UPLOADS: Final = 1.5
_DEVICE_CLASS: Final = "aggregator"

log = structlog.get_logger()


def round_link(settings: WorkerSettings, link: WorkerLink, session: Session, runs: LeafRuns) -> Loop:
    """Return the loop that takes training tasks from the parent. Raises `StorageError`."""
    client, publisher, files = _ends(settings, link, session)
    return _loop(settings, link, client, publisher, files, RoundWork(settings, files, publisher, runs))


async def relay_scores(
    settings: WorkerSettings, link: WorkerLink, session: Session, runs: LeafRuns, lease_s: float
) -> None:
    """Be an evaluator of the parent from the leaf's first evaluator until the parent's run has ended.

    `settings` are those of the leaf as a worker. Evaluators are counted every `lease_s`.
    """
    await _until_needed(runs)
    settings = replace(
        settings,
        name=settings.name + EVALUATORS,
        state_dir=settings.state_dir / "evaluators",
        role=WorkerRole.EVALUATOR,
    )
    try:
        client, publisher, files = _ends(settings, link, session)
        work = ScoringWork(settings, client, files, publisher, runs, lease_s)
        await _loop(settings, link, client, publisher, files, work).run()
    except FedgrpcError as error:
        log.warning("the scores of evaluators stay here", reason=str(error))


def _ends(
    settings: WorkerSettings, link: WorkerLink, session: Session
) -> tuple[AggregatorClient, StatusPublisher, TaskFiles]:
    client = AggregatorClient(link.channel, settings.name, settings.throttle, settings.stall_s, session=session)
    link.serve(client)
    publisher = StatusPublisher(Status(settings.name, settings.aggregator))
    return client, publisher, TaskFiles(settings, client, publisher)


def _loop(
    settings: WorkerSettings,
    link: WorkerLink,
    client: AggregatorClient,
    publisher: StatusPublisher,
    files: TaskFiles,
    work: LocalWork,
) -> Loop:
    overrides = {"device_class": _DEVICE_CLASS, **settings.device}
    return Loop(
        settings,
        client,
        publisher,
        Controls(),
        files,
        work,
        lambda: detect().with_overrides(overrides),
        tls_flags="--upstream-tls",
        renew=link.on_stale,
    )


async def _until_needed(runs: LeafRuns) -> None:
    """Wait until the leaf has an evaluator."""
    while True:
        await runs.serving.wait()
        run = runs.present
        await run.handoff.evaluators.wait()
        # A new run wakes all waiters. Ignore that wake-up.
        if runs.serving.is_set() and runs.present is run:
            return


class RoundWork:
    """Has the leaf's workers carry out a task of the parent in a round of their own. A `LocalWork`."""

    gives_back = False
    parts = ALL_PARTS

    def __init__(
        self, settings: WorkerSettings, files: TaskFiles, publisher: StatusPublisher, runs: LeafRuns
    ) -> None:
        self._settings = settings
        self._files = files
        self._publisher = publisher
        self._runs = runs

    async def prepare(self, registration: Registration) -> bool:
        """See `LocalWork.prepare`: serve workers for the parent's run."""
        await self._runs.lead(registration)
        return False

    async def description(self, registration: Registration) -> ModelDescription | None:
        """See `LocalWork.description`: what the leaf's own workers have told."""
        coordinator = self._runs.of(registration.run_id).aggregator.coordinator
        channels = None if coordinator is None else coordinator.local_models.channel_map
        asked = registration.tell_channels and channels is not None
        return ModelDescription(channels=channels) if asked else None

    @asynccontextmanager
    async def polling(self, registration: Registration) -> AsyncIterator[None]:
        """See `LocalWork.polling`: the parent counts on whoever polls, so wait until there are enough workers."""
        self._publisher.enter(Activity.WAITING)
        handoff = self._runs.present.handoff
        if not handoff.resuming:
            await handoff.enough_workers.wait()
        yield
        handoff.resuming = False

    async def perform(self, task: Task, message: aggregator_pb2.Task, report: Report) -> SpooledUpdate:
        """Download, run a round of the leaf's workers, and spool the mean. See `LocalWork.perform`."""
        run = self._runs.of(task.run_id)
        if not task.sub_model.whole or task.local_model is not None:
            raise TaskError("an aggregator takes the whole model as it is")
        layout: Layout = ()
        given: Mapping[str, Array] = {}
        download_s = 0.0
        if task.kind is not TaskKind.INITIALIZE:
            layout, given, download_s = await _download(self._files, task, report)
        began = Began(download_s, time.monotonic())
        self._publisher.enter(Activity.EVALUATING if task.kind is TaskKind.EVALUATE else Activity.TRAINING)
        parent_task = ParentTask(message, layout, given, self._due_at(task, run))
        watching = asyncio.create_task(run.watch(lambda progress: self._publisher.show(progress=progress)))
        try:
            mean = await run.handoff.carry_out(parent_task)
        except asyncio.CancelledError:
            # The end of the process ends no round: it is on the disk, and continues after a restart.
            if not self._runs.closing:
                run.handoff.withdraw(parent_task, "the parent no longer wants it")
            raise
        finally:
            watching.cancel()

        def fill(residual: Residual) -> Fill:
            return sending(task, self._settings.name, mean, residual, began)

        return await self._files.store(task, message, fill)

    def _due_at(self, task: Task, run: LeafRun) -> float | None:
        if task.deadline_s is None:
            return None
        left_s = max(0.0, task.deadline_s - time.monotonic())
        upload_s = max(_RESERVED * left_s, _LAST_UPLOADS * self._publisher.status.last_timings.upload_s)
        return task.deadline_s - min(run.answers_s + upload_s, left_s / 2)


class ScoringWork:
    """Has the leaf's evaluators score a version of the parent. A `LocalWork`."""

    gives_back = False
    parts = ALL_PARTS

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        files: TaskFiles,
        publisher: StatusPublisher,
        runs: LeafRuns,
        lease_s: float,
    ) -> None:
        self._settings = settings
        self._client = client
        self._files = files
        self._publisher = publisher
        self._runs = runs
        self._lease_s = lease_s

    async def prepare(self, registration: Registration) -> bool:
        """See `LocalWork.prepare`. Raises `LinkError` until the other link leads the run."""
        self._runs.of(registration.run_id)
        return False

    async def description(self, registration: Registration) -> None:
        """See `LocalWork.description`: the other link tells."""
        return

    @asynccontextmanager
    async def polling(self, registration: Registration) -> AsyncIterator[None]:
        """See `LocalWork.polling`: leave the parent while the leaf has no evaluator."""
        self._publisher.enter(Activity.WAITING)
        evaluators = self._runs.of(registration.run_id).handoff.evaluators
        if not evaluators.is_set():
            await leave(self._client)
            await evaluators.wait()
        yield

    async def perform(self, task: Task, message: aggregator_pb2.Task, report: Report) -> SpooledUpdate:
        """Show the version to the leaf's evaluators, and spool the mean of their scores."""
        run = self._runs.of(task.run_id)
        coordinator, download_s = run.aggregator.coordinator, 0.0
        assert coordinator is not None
        if coordinator.machine.version < task.model_version:
            layout, given, download_s = await _download(self._files, task, report)
            await run.handoff.show(VersionToScore(task.model_version, layout, given))
        began = Began(download_s, time.monotonic())
        self._publisher.enter(Activity.EVALUATING)
        scores = await self._scores(coordinator, task.model_version)
        outcome = Outcome(None, scores.example_count, scores=scores)

        def fill(residual: Residual) -> Fill:
            return update_of(task, self._settings.name, {}, outcome, residual, began)

        return await self._files.store(task, message, fill)

    async def _scores(self, coordinator: Coordinator, version: int) -> EvalResult:
        """Wait until all live evaluators have scored it. Raises `TaskError` when none of them has."""
        seen, evaluations = -1, coordinator.machine.evaluations
        while any(
            evaluations.waiting_for(worker.name, version)
            for worker in coordinator.fleet.live_evaluators(coordinator.clock())
        ):
            try:
                # An evaluator that disappears sends no notice: look again when its lease is over.
                async with asyncio.timeout(self._lease_s):
                    seen = await coordinator.changes.wait(seen)
            except TimeoutError:
                continue
        if (found := evaluations.scores_of(version)) is None:
            raise TaskError(f"no evaluator has scored version {version}")
        return EvalResult(*found)


async def _download(files: TaskFiles, task: Task, report: Report) -> tuple[Layout, Mapping[str, Array], float]:
    """Return the task's model, each tensor left on the disk until it is read, and the download's seconds."""
    held, download_s = await files.download(task, report)
    return held.manifest.layout, await asyncio.to_thread(held.tensors), download_s

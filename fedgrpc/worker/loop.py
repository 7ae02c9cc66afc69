"""The worker's loop: connect, wait, download, train, upload, wait.

Recovery has one path. Whatever breaks the link ends the session; the next one registers, sends what is in the
spool, and polls. The aggregator then answers with the task still held, whose download goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import structlog

from fedgrpc.aio import Interrupted, in_thread, run_until_interrupted
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import (
    CorruptError,
    FedgrpcError,
    LinkError,
    NameTaken,
    StorageError,
    TaskError,
    TaskUnfit,
    UnknownWorker,
    UsageError,
    WrongOffset,
)
from fedgrpc.rpc.address import dialled
from fedgrpc.rpc.diagnosis import explain
from fedgrpc.rpc.retry import Backoff, Retries, with_retries
from fedgrpc.storage.files import storage_errors
from fedgrpc.trainer import Cancelled, Trainer, Weights
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.client import AggregatorClient, Polled
from fedgrpc.worker.delivery import Delivery
from fedgrpc.worker.device import DeviceProfile
from fedgrpc.worker.model_store import HeldModel, ModelFolder, Source
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import Spool, SpooledUpdate
from fedgrpc.worker.status import Activity, Controls, StatusPublisher
from fedgrpc.worker.task import Registration, Task, TaskKind
from fedgrpc.worker.training import (
    ALL_PARTS,
    Hooks,
    evaluate,
    fitting,
    initialize,
    parts_of,
    train,
)
from fedgrpc.worker.update import (
    Began,
    Outcome,
    is_personal,
    load_personal_layers,
    personal_layers_writer,
    update_of,
)

_TRIES: Final = 3
_TRIES_TO_SPOOL: Final = 5
# About ten seconds together.
_TRIES_TO_READ: Final = 6
_UNREADABLE: Final = Backoff(first_s=0.5, cap_s=5.0)
_GOODBYE_S: Final = 2.0
_LEAVE_S: Final = 10.0
_REPORT_INTERVAL_S: Final = 0.1
_SETTLED_S: Final = 0.1

# The weights that were pulled, writable and nobody else's, each time it is called. Slow: call it in a thread.
Given = Callable[[], Weights]

log = structlog.get_logger()


class Loop:
    """One worker's life with one aggregator."""

    _TLS_FLAGS = "--tls"

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
        controls: Controls,
        spool: Spool,
        models: ModelFolder,
        build_trainer: Callable[[Registration], Trainer],
        profile: Callable[[], DeviceProfile],
    ) -> None:
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._controls = controls
        self._spool = spool
        self._models = models
        self._build_trainer = build_trainer
        self._profile = profile
        self._trainer: Trainer | None = None
        self._run_id = ""
        self._heartbeat_interval_s = 5.0
        self._retries = Retries(settings.backoff)
        self._why = ""
        self._download_began: tuple[str, float] = ("", 0.0)
        self._show_at_s = 0.0
        self._delivery = Delivery(client, spool, publisher, self._beat)
        self._log: Any = log.bind(worker=settings.name)

    async def run(self) -> None:
        """Until the run has ended or the worker has drained.

        This is the one retry loop that only an order ends: a device holds on to its aggregator for ever.

        Raises:
            FedgrpcError: the aggregator refuses this worker for good, or its learning task cannot be built.
        """
        while True:
            self._publisher.enter(Activity.CONNECTING)
            try:
                return await self._session()
            except FedgrpcError as error:
                if not error.retryable:
                    raise
                self._check_folder(error)
                reason = await self._explained(error)
            if self._controls.draining and not self._spool.count(self._run_id):
                return
            delay_s = self._retries.next_delay_s()
            self._publisher.show(last_error=reason)
            self._log.warning("disconnected", reason=reason, retry_in_s=round(delay_s, 2))
            await (asyncio.sleep(delay_s) if self._controls.draining else self._controls.wait(delay_s))

    def _check_folder(self, error: FedgrpcError) -> None:
        """Raise `UsageError` where no later try can succeed, because the state folder has been removed."""
        folder = self._settings.state_dir
        # The spool is made at the start alone; other folders may come back.
        if isinstance(error, StorageError) and not (folder / "spool").exists():
            raise UsageError(f"the folder {folder} was removed while it was in use; start again") from error

    async def _explained(self, error: FedgrpcError) -> str:
        """The error, with what helps; that is looked into after the first of several failures."""
        if not isinstance(error, LinkError):
            return str(error)
        if not self._retries.failures:
            settings = self._settings
            where = dialled(settings.aggregator)
            self._why = await asyncio.to_thread(explain, where, settings.tls, self._TLS_FLAGS)
        return f"{self._why} ({error})" if self._why else str(error)

    async def _session(self) -> None:
        registration = await self._connect()
        for update in await self._unsent(registration):
            await self._deliver(update)
        while (polled := await self._next_answer(registration)) is not None:
            if polled.task is not None and polled.message is not None:
                await self._perform(polled.task, polled.message)
                continue
            self._retries.reset()
            if polled.run_ended and self._settings.exit_when_run_ends:
                self._log.info("run ended", run=registration.run)
                return
            if polled.run_ended:
                await self._controls.wait(self._settings.poll_wait_s)
        await self._leave()

    async def _unsent(self, registration: Registration) -> list[SpooledUpdate]:
        """The updates of this run that are still to be sent. What cannot be read now is waited for."""
        retries = Retries(_UNREADABLE)
        updates = await asyncio.to_thread(self._spool.updates)
        while self._spool.unreadable and retries.failures < _TRIES_TO_READ:
            await self._controls.wait(retries.next_delay_s())
            updates = await asyncio.to_thread(self._spool.updates)
        self._run_id = registration.run_id
        own = [update for update in updates if update.is_of(registration.run_id)]
        others = [update for update in updates if not update.is_of(registration.run_id)]
        await asyncio.to_thread(self._spool.keep_for_later, others, self._settings.spool_keep_s)
        return own

    async def _connect(self) -> Registration:
        registration = await self._register()
        if self._trainer is None:
            self._trainer = await asyncio.to_thread(self._build_trainer, registration)
            profile = await asyncio.to_thread(self._profile)
            if profile != self._publisher.status.device or self._parts() != ALL_PARTS:
                # The learning task has brought its libraries, and with them the knowledge of the accelerator.
                registration = await self._register()
        self._log.info("connected", run=registration.run, aggregator=self._settings.aggregator)
        return registration

    async def _register(self) -> Registration:
        profile = await asyncio.to_thread(self._profile)
        registration = await self._client.register(profile, self._settings.role, self._parts())
        await asyncio.to_thread(self._models.forget_other_runs, registration.run_id)
        self._heartbeat_interval_s = registration.heartbeat_interval_s
        self._publisher.show(run=registration.run, device=profile)
        self._show_disk()
        return registration

    def _parts(self) -> frozenset[str]:
        """What the trainer can do of a local-model plan; before it is built, what most can."""
        return ALL_PARTS if self._trainer is None else parts_of(self._trainer)

    async def _next_answer(self, registration: Registration) -> Polled | None:
        """The answer to a poll; None when the worker is to drain."""
        wait_s = min(registration.poll_wait_s or self._settings.poll_wait_s, self._settings.poll_wait_s)
        while not self._controls.draining:
            if self._controls.paused:
                self._publisher.enter(Activity.PAUSED)
                await self._controls.changed()
                continue
            self._publisher.enter(Activity.WAITING)
            poll = self._client.poll(wait_s, self._models.held)
            try:
                return await run_until_interrupted(poll, self._controls.changed())
            except Interrupted:
                continue
        return None

    async def _perform(self, task: Task, message: aggregator_pb2.Task) -> None:
        """One task from download to acknowledgement; its failure is reported and ends nothing else."""
        task_log = self._log.bind(run=task.run, round=task.round)
        task_log.info("task started", kind=task.kind.name.lower(), version=task.model_version)
        self._publisher.show(round=task.round, task_kind=task.kind)
        try:
            update = await run_until_interrupted(self._work(task, message), self._beat(task.token))
        except (Interrupted, Cancelled) as interruption:
            task_log.warning("task cancelled", reason=str(interruption) or "the learning task ended it")
        except asyncio.CancelledError:
            await self._say_goodbye(task)
            raise
        except TaskUnfit as error:
            await self._say_goodbye(task, str(error))
            raise
        except FedgrpcError as error:
            if error.retryable and not isinstance(error, StorageError):
                raise
            task_log.warning("task failed", reason=str(error))
            await self._give_back(task, str(error))
            self._check_folder(error)
        else:
            await self._deliver(update, new=True)
        finally:
            self._publisher.show(task_kind=None)

    async def _deliver(self, update: SpooledUpdate, new: bool = False) -> None:
        try:
            delivered = await self._delivery.deliver(update, self._moved, new)
        except StorageError:
            # It may be this disk that fails, or the aggregator's.
            self._spool.doubt(update)
            raise
        self._show_disk()
        if delivered:
            self._retries.reset()
        else:
            await self._controls.wait(self._retries.next_delay_s())

    async def _work(self, task: Task, message: aggregator_pb2.Task) -> SpooledUpdate:
        """Download, train or score, and spool the update. Raises `TaskError` for a plan that is refused here."""
        _check_plan(task, self._settings.min_batch_size)
        given, layout, download_s = await self._download(task)
        began = Began(download_s, time.monotonic())
        stop = threading.Event()
        hooks = Hooks(stop, self._reporter(stop), self._settings.throttle)
        assert self._trainer is not None
        with fitting(task):
            outcome = await self._local_work(self._trainer, task, given, hooks)

        def spooled() -> SpooledUpdate:
            # Read anew: the learning task may have trained in the very arrays that it was given.
            pulled = {} if outcome.weights is None else given()
            residual = self._spool.residual(task.run_id)
            fill = update_of(task, self._settings.name, pulled, outcome, residual, began, layout)
            keep = personal_layers_writer(outcome.weights or {}, task.run_id, is_personal(task.plan))
            return self._spool.write(message, fill, keep)

        # The disk may be full for a moment only, and training may have taken hours.
        update = await with_retries(
            lambda: asyncio.to_thread(spooled),
            attempts=_TRIES_TO_SPOOL,
            backoff=self._settings.backoff,
            retry_on=(StorageError,),
        )
        self._show_disk()
        return update

    async def _download(self, task: Task) -> tuple[Given, Layout, float]:
        """The weights to start from, their layout, and the seconds that their download took, in any sessions."""
        if task.kind is TaskKind.INITIALIZE:
            return dict, (), 0.0
        held, download_s = await self._hold(task)

        def given() -> Weights:
            with storage_errors(self._spool.personal):
                return load_personal_layers(
                    held.weights(), self._spool.personal, task.run_id, is_personal(task.plan)
                )

        return given, held.manifest.layout, download_s

    async def _hold(self, task: Task) -> tuple[HeldModel, float]:
        """The version that the task is for, on the disk, and the seconds since its download began."""
        self._publisher.enter(Activity.DOWNLOADING)
        if self._download_began[0] != task.token:
            self._download_began = (task.token, time.monotonic())
        sub_model = task.plan.sub_model
        slice_text = "" if sub_model.whole else str(sub_model)
        source = Source(task.run_id, task.model_version, task.download_recipe, slice_text)

        async def checked() -> HeldModel:
            held = await self._client.pull(self._models, source, self._moved)
            await asyncio.to_thread(self._models.check_held)
            return held

        held = await with_retries(
            checked,
            attempts=_TRIES,
            backoff=self._settings.backoff,
            retry_on=(CorruptError, WrongOffset),
        )
        self._show_disk()
        return held, time.monotonic() - self._download_began[1]

    async def _local_work(self, trainer: Trainer, task: Task, given: Given, hooks: Hooks) -> Outcome:
        if task.kind is TaskKind.INITIALIZE:
            self._publisher.enter(Activity.TRAINING)
            return await in_thread(lambda: initialize(trainer, task.plan), hooks.stop)
        scores = None
        if task.kind is TaskKind.EVALUATE or task.plan.evaluate:
            self._publisher.enter(Activity.EVALUATING)
            scores = await in_thread(lambda: evaluate(trainer, given(), hooks), hooks.stop)
        if task.kind is TaskKind.EVALUATE:
            if scores is None:
                raise TaskError("there is no held-out data on this device to score the model on")
            return Outcome(None, scores.example_count, scores=scores)
        self._publisher.enter(Activity.TRAINING)
        return await in_thread(lambda: train(trainer, given(), task, hooks, scores), hooks.stop)

    async def _beat(self, token: str) -> str:
        """Keep a task's lease: at the told interval, and when its phase changes. Returns why it is to stop."""
        while True:
            # A phase that is over at once is not worth a call.
            await asyncio.sleep(min(_SETTLED_S, self._heartbeat_interval_s / 2))
            status = self._publisher.status
            try:
                beat = await self._client.heartbeat(token, status.activity.phase, status.progress)
                if beat.cancel:
                    return beat.reason or "cancelled by the aggregator"
            except UnknownWorker:
                await self._register()
            except FedgrpcError as error:
                if not error.retryable or isinstance(error, NameTaken):
                    return str(error)
                self._log.debug("heartbeat failed", reason=str(error))
            if self._publisher.status.activity is status.activity:
                await self._publisher.next_activity(self._heartbeat_interval_s)

    async def _give_back(self, task: Task, reason: str) -> None:
        """Report a failure, and wait a little: a task that fails at once must not spin."""
        self._publisher.show(last_error=reason)
        try:
            await self._client.report_failure(task.token, reason)
        except FedgrpcError as error:
            if error.retryable:
                raise
        await self._controls.wait(self._retries.next_delay_s())

    async def _say_goodbye(self, task: Task, reason: str = "the worker is shutting down") -> None:
        """The worker ends before its task: say so, that another may take it, but do not wait long."""
        try:
            await self._client.report_failure(task.token, reason, _GOODBYE_S)
        except FedgrpcError as error:
            self._log.debug("goodbye not heard", reason=str(error))
        else:
            await self._leave()

    async def _leave(self) -> None:
        """Nobody is to wait for this worker any more."""
        try:
            await self._client.leave(_LEAVE_S)
        except FedgrpcError as error:
            self._log.debug("goodbye not heard", reason=str(error))

    def _moved(self, progress: float) -> None:
        """Bytes went through: the link works."""
        self._retries.reset()
        now_s = time.monotonic()
        if now_s >= self._show_at_s or progress >= 1.0:
            self._show_at_s = now_s + _REPORT_INTERVAL_S
            self._publisher.show(progress=progress)

    def _reporter(self, stop: threading.Event) -> Callable[[float], None]:
        """Shows progress from the training thread, a few times a second."""
        loop = asyncio.get_running_loop()
        next_at_s = 0.0

        def report(progress: float) -> None:
            nonlocal next_at_s
            now_s = time.monotonic()
            if now_s >= next_at_s and not stop.is_set():
                next_at_s = now_s + _REPORT_INTERVAL_S
                loop.call_soon_threadsafe(lambda: self._publisher.show(progress=progress))

        return report

    def _show_disk(self) -> None:
        held = self._models.held
        version = 0 if held is None else held.version
        self._publisher.show(model_version=version, spooled_updates=self._spool.count())


def _check_plan(task: Task, min_batch_size: int) -> None:
    """What an update tells of single examples is for the owner of the device to bound, whatever the plan says."""
    batch_size = task.plan.batch_size
    if task.kind is TaskKind.TRAIN and batch_size is not None and batch_size < min_batch_size:
        raise TaskError(
            f"this device trains on no batches of {batch_size}: its --min-batch-size is {min_batch_size}"
        )

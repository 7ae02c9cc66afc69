"""The worker's loop: connect, poll, have the task carried out, deliver its update, poll again.

Recovery has one path. Any failure of the link ends the session. The next session registers, sends what is in the
spool, and polls. The aggregator then answers with the task still held, and its download resumes where it stopped.

The class of an error says whether the same call may succeed later (`FedgrpcError.retryable`). These are retried:

    the session         after every retryable error, without a bound (`Loop.run`)
    a download          3 times, where bytes are damaged or of another payload (`TaskFiles.download`)
    spooling            5 times, where the disk is full or cannot be written (`TaskFiles.store`)
    an upload           3 times, where bytes are damaged or at another offset (`Delivery`)
    an upload slot      without a bound, at the times that the aggregator tells (`Delivery`)
    updates on disk     6 times, where a file cannot be read now (`Loop._unsent`)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from typing import Any, Final

import structlog

from fedgrpc.aio import Interrupted, run_until_interrupted
from fedgrpc.errors import (
    CertificateStale,
    FedgrpcError,
    LinkError,
    NameTaken,
    StorageError,
    TaskUnfit,
    UnknownWorker,
    UsageError,
)
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.devices import Activity, DeviceProfile
from fedgrpc.protocol.tasks import Registration, Task, WorkerRole, registration_of
from fedgrpc.rpc.address import dialled
from fedgrpc.rpc.diagnosis import explain
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.trainer import Cancelled
from fedgrpc.v1 import aggregator_pb2, device_pb2, privacy_pb2
from fedgrpc.worker.caller import told_reason
from fedgrpc.worker.client import AggregatorClient, HeldOfRun, Polled
from fedgrpc.worker.conditions import OwnersConditions
from fedgrpc.worker.delivery import Delivery
from fedgrpc.worker.local_work import LocalWork, TaskFiles
from fedgrpc.worker.run_work import RunWork, WorkerRuns
from fedgrpc.worker.secure_part import answer
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import SpooledUpdate
from fedgrpc.worker.status import Controls, StatusPublisher

# About ten seconds in all: a file that cannot be read for a moment (EIO, EMFILE) is readable again by then.
_TRIES_TO_READ: Final = 6
_UNREADABLE: Final = Backoff(first_s=0.5, cap_s=5.0)
# Short: a process that gets SIGTERM is killed soon after, and the lease ends the task anyway.
_GOODBYE_S: Final = 2.0
_LEAVE_S: Final = 10.0
_REPORT_INTERVAL_S: Final = 0.1
# A phase that is over sooner gets no heartbeat.
SETTLED_S: Final = 1.0
# How often a device that waits for its own conditions looks again.
_LOOK_AGAIN_S: Final = 20.0

log = structlog.get_logger()


class Loop:
    """Connection of one worker to one aggregator, from its first registration to the end of the run."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
        controls: Controls,
        files: TaskFiles,
        work: LocalWork,
        profile: Callable[[], DeviceProfile],
        *,
        tls_flags: str = "--tls",
        renew: Callable[[], Awaitable[None]] | None = None,
        runs: WorkerRuns | None = None,
        conditions: OwnersConditions | None = None,
    ) -> None:
        """`runs` are those beside the aggregator's own one; None: the worker serves that one alone.

        `conditions` measures the device before each poll, and says whether it takes tasks. `tls_flags` is the
        common prefix of the link's TLS flags, for error messages. `renew` gets a new certificate when the
        aggregator finds the present one too old.
        """
        self._settings = settings
        self._client = client
        self._deliveries: dict[str, Delivery] = {}
        # Runs whose updates of a former process were sent in this session.
        self._delivered: set[str] = set()
        self._publisher = publisher
        self._controls = controls
        self._files = files
        self._spool = files.spool
        self._models = files.models
        self._work = work
        self._profile = profile
        self._tls_flags = tls_flags
        self._renew = renew
        self._runs = runs
        self._conditions = conditions or OwnersConditions(settings.name)
        self._run_id = ""
        self._heartbeat_interval_s = 5.0
        self._retries = Retries(settings.backoff)
        self._why = ""
        self._show_at_s = 0.0
        self._log: Any = log.bind(worker=settings.name)

    @property
    def run_id(self) -> str:
        """Id of the aggregator's own run; empty before the first registration."""
        return self._run_id

    async def run(self) -> None:
        """Run until the run has ended or the worker has drained.

        This is the only retry loop without a bound. A device in the field waits for its aggregator however long
        that is away, and no person beside it starts it again.

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
                error = await self._renewed(error)
                reason = await self._explained(error)
            if self._controls.draining and not self._spool.count(self._run_id):
                return
            delay_s = self._retries.next_delay_s()
            self._publisher.show(last_error=reason)
            self._log.warning("disconnected", reason=reason, retry_in_s=round(delay_s, 2))
            await (asyncio.sleep(delay_s) if self._controls.draining else self._controls.wait(delay_s))

    async def _renewed(self, error: FedgrpcError) -> FedgrpcError:
        """Renew the certificate if that is what failed; return what failed at last. Raises what is final."""
        if not isinstance(error, CertificateStale) or self._renew is None:
            return error
        try:
            await self._renew()
        except FedgrpcError as failure:
            if not failure.retryable:
                raise
            return failure
        return error

    def _check_folder(self, error: FedgrpcError) -> None:
        """Raise `UsageError` where no later try can succeed, because the state folder has been removed."""
        folder = self._settings.state_dir
        # Only the start creates the spool. Other folders are created again when they are needed.
        if isinstance(error, StorageError) and not (folder / "spool").exists():
            raise UsageError(f"the folder {folder} was removed while it was in use; start again") from error

    async def _explained(self, error: FedgrpcError) -> str:
        """Return the error with its likely cause, which is diagnosed once for several failures in a row."""
        if not isinstance(error, LinkError):
            return str(error)
        if not self._retries.failures:
            settings = self._settings
            where = dialled(settings.aggregator)
            self._why = await asyncio.to_thread(explain, where, settings.tls, self._tls_flags)
        return f"{self._why} ({error})" if self._why else str(error)

    async def _session(self) -> None:
        registration = await self._connect()
        own = RunWork(registration, self._files, self._work, own=True)
        if registration.run_id:
            for update in await self._unsent(registration):
                await self._deliver(own, update)
        self._delivered = {registration.run_id}
        while (polled := await self._poll(own)) is not None:
            if polled.task is not None and polled.message is not None:
                await self._perform_of(own, polled)
                continue
            if polled.question is not None:
                await self._answer(own, polled.question)
                continue
            if polled.introduce is not None:
                await self._introduce(own, polled.introduce)
                continue
            self._retries.reset()
            if polled.run_ended and self._settings.exit_when_run_ends:
                self._log.info("run ended", run=registration.run, to_wait_for_the_next="--stay")
                return
            if polled.run_ended:
                await self._controls.wait(self._settings.poll_wait_s)
        await leave(self._client)

    async def _perform_of(self, own: RunWork, polled: Polled) -> None:
        """Carry out a task of whichever run, once what a former process left of that run is delivered."""
        task, message = polled.task, polled.message
        assert task is not None
        assert message is not None
        run: RunWork | None = own
        if self._runs is not None and task.run_id != own.run_id:
            run = await self._runs.of_task(own.registration, message)
        # What the task asks for may be among the updates: the next poll shows it.
        if run is not None and await self._deliver_unsent(run):
            return
        if run is None or not await self._prepared(run):
            await self._give_back(task, "this device takes no tasks of this run")
            return
        await self._perform(run, task, message)

    async def _answer(self, own: RunWork, question: privacy_pb2.SecureQuestion) -> None:
        """Answer for a secure sum. Who does not is left out, or the round is abandoned."""
        memory = own.files.secure
        if self._runs is not None and question.run_id not in ("", own.run_id):
            memory = self._runs.secure_memory(question.run_id)
        try:
            await answer(memory, self._client, question)
            self._retries.reset()
        except FedgrpcError as error:
            if error.retryable:
                raise
            self._log.warning("not answered for a secure sum", reason=str(error))
            self._publisher.show(last_error=str(error))
            await self._controls.wait(self._retries.next_delay_s())

    async def _introduce(self, own: RunWork, terms: aggregator_pb2.RunTerms) -> None:
        """Get ready for a run, and tell the aggregator of its model, or that this device takes no tasks of it."""
        if self._runs is None or not terms.run_id:
            await self._controls.wait(self._retries.next_delay_s())
            return
        run = await self._runs.open(registration_of(own.registration, terms))
        await self._deliver_unsent(run)
        if await self._prepared(run):
            await self._runs.describe(run)

    async def _prepared(self, run: RunWork) -> bool:
        """Build the learning task of a run; False where this device takes no tasks of it."""
        if run.own or self._runs is None:
            return True
        reason = await self._runs.prepare(run)
        if reason:
            self._publisher.show(last_error=f"run {run.registration.run}: {reason}")
        return not reason

    async def _deliver_unsent(self, run: RunWork) -> bool:
        """Deliver what a former process left of a run, once a session; whether there was something."""
        if run.run_id in self._delivered:
            return False
        self._delivered.add(run.run_id)
        updates = await asyncio.to_thread(run.files.spool.updates)
        for update in updates:
            await self._deliver(run, update)
        return bool(updates)

    async def _unsent(self, registration: Registration) -> list[SpooledUpdate]:
        """Return the updates of this run that are still to be sent. Wait a while for those that cannot be read."""
        retries = Retries(_UNREADABLE)
        updates = await asyncio.to_thread(self._spool.updates)
        while self._spool.unreadable and retries.failures < _TRIES_TO_READ:
            await self._controls.wait(retries.next_delay_s())
            updates = await asyncio.to_thread(self._spool.updates)
        # From here on, draining waits for the updates of this run alone.
        self._run_id = registration.run_id
        own = [update for update in updates if update.is_of(registration.run_id)]
        others = [update for update in updates if not update.is_of(registration.run_id)]
        await asyncio.to_thread(self._spool.keep_for_later, others, self._settings.spool_keep_s)
        return own

    async def _connect(self) -> Registration:
        registration = await self._register()
        parts = self._work.parts
        if registration.run_id and await self._work.prepare(registration):
            profile = await asyncio.to_thread(self._profile)
            if profile != self._publisher.status.device or self._work.parts != parts:
                # The learning task has loaded its libraries, which know the accelerator.
                registration = await self._register()
        self._log.info("connected", run=registration.run, aggregator=self._settings.aggregator)
        return registration

    async def _register(self) -> Registration:
        profile = await asyncio.to_thread(self._profile)
        many = self._runs is not None
        registration = await self._client.register(profile, self._settings.role, self._work.parts, many)
        if registration.run_id:
            await asyncio.to_thread(self._models.forget_other_runs, registration.run_id)
        self._heartbeat_interval_s = registration.heartbeat_interval_s
        self._publisher.show(run=registration.run, device=profile)
        self._files.show()
        return registration

    async def _poll(self, own: RunWork) -> Polled | None:
        """Return the answer to a poll; None when the worker is to drain."""
        async with AsyncExitStack() as stack:
            new_examples = None
            if own.run_id:
                new_examples = await stack.enter_async_context(own.work.polling(own.registration))
                await self._describe(own)
            others = []
            for run in () if self._runs is None else self._runs.opened:
                new = await stack.enter_async_context(run.work.polling(run.registration))
                others.append((run.run_id, run.files.models.held, new, await self._keys(run)))
            keys = await self._keys(own) if own.run_id else None
            return await self._poll_unless_paused(own.registration, new_examples, others, keys)

    async def _keys(self, run: RunWork) -> PublicKeys | None:
        """Return this device's keys for the next secure sum of a run; None: it takes part in none."""
        if self._settings.role is not WorkerRole.TRAINER:
            return None
        try:
            return await asyncio.to_thread(run.files.one_time_keys, run.run_id)
        except StorageError as error:
            self._log.warning("no keys for secure sums", reason=str(error))
            return None

    async def _describe(self, own: RunWork) -> None:
        """Tell the aggregator of the model before a poll that may bring the first task, once unless it changes."""
        if not own.registration.describe_model:
            return
        description = await own.work.description(own.registration)
        if description is not None and description != own.described:
            await self._client.describe(description)
            own.described = description

    async def _until_willing(self) -> device_pb2.DeviceConditions | None:
        """Wait until the device is as its owner wants it for a task; return how it is then, or on draining."""
        left = False
        while True:
            found, willing = await self._conditions.look(self._publisher.status.device)
            if willing or self._controls.draining:
                return found
            if not left:
                self._publisher.enter(Activity.PAUSED)
                self._publisher.show(notice=f"no tasks now: only when {self._settings.only_when}")
                self._log.info("no tasks now", only_when=self._settings.only_when)
                await leave(self._client)
                left = True
            await self._controls.wait(_LOOK_AGAIN_S)

    async def _poll_unless_paused(
        self,
        registration: Registration,
        new_examples: int | None,
        others: Collection[HeldOfRun],
        keys: PublicKeys | None,
    ) -> Polled | None:
        wait_s = min(registration.poll_wait_s or self._settings.poll_wait_s, self._settings.poll_wait_s)
        while not self._controls.draining:
            if self._controls.paused:
                self._publisher.enter(Activity.PAUSED)
                await self._controls.changed()
                continue
            conditions = await self._until_willing()
            if self._controls.draining or self._controls.paused:
                continue
            self._publisher.enter(Activity.WAITING)
            poll = self._client.poll(wait_s, self._models.held, new_examples, others, conditions, keys)
            try:
                return await run_until_interrupted(poll, self._controls.changed())
            except Interrupted:
                continue
        return None

    async def _perform(self, run: RunWork, task: Task, message: aggregator_pb2.Task) -> None:
        """Carry out one task, from download to acknowledgement. Its failure is reported and ends nothing else."""
        task_log = self._log.bind(run=task.run, round=task.round)
        task_log.info("task started", kind=task.kind.name.lower(), version=task.model_version)
        self._publisher.show(run=task.run, round=task.round, task_kind=task.kind)
        work = run.work.perform(task, message, self._moved)
        try:
            update = await run_until_interrupted(work, self._beat(task.token))
        except (Interrupted, Cancelled) as interruption:
            task_log.warning("task cancelled", reason=str(interruption) or "the learning task ended it")
        except asyncio.CancelledError:
            await self._say_goodbye(task)
            raise
        except TaskUnfit as error:
            told = told_reason(error, not task.metrics)
            if self._runs is not None and not run.own:
                await self._give_back(task, str(error), told)
                await self._runs.refuse(run, error)
                return
            await self._say_goodbye(task, told)
            raise
        except FedgrpcError as error:
            # A lost link keeps the task: the next session resumes it. A full disk here does not heal by connecting
            # again, so another worker gets the task.
            if error.retryable and not isinstance(error, StorageError):
                raise
            task_log.warning("task failed", reason=str(error))
            await self._give_back(task, str(error), told_reason(error, not task.metrics))
            self._check_folder(error)
        else:
            await self._deliver(run, update, new=True)
        finally:
            self._publisher.show(task_kind=None)

    async def _deliver(self, run: RunWork, update: SpooledUpdate, new: bool = False) -> None:
        delivery = self._delivery_of(run)
        try:
            delivered = await delivery.deliver(update, self._moved, new)
        except StorageError:
            # The failing disk may be this one or the aggregator's: read the update through before it is sent
            # again.
            run.files.spool.doubt(update)
            raise
        run.files.show()
        if delivered:
            self._retries.reset()
        else:
            await self._controls.wait(self._retries.next_delay_s())

    def _delivery_of(self, run: RunWork) -> Delivery:
        """Return the delivery of a run's spool, which remembers over sessions when an upload began."""
        known = self._deliveries.get(run.run_id)
        if known is None:
            spool, secure, only = run.files.spool, run.files.secure, self._settings.only_secure
            known = Delivery(self._client, spool, self._publisher, self._beat, secure, only)
            self._deliveries[run.run_id] = known
        return known

    async def _beat(self, token: str) -> str:
        """Keep a task's lease, at the told interval and at each change of phase. Return why the task must stop."""
        while True:
            await asyncio.sleep(min(SETTLED_S, self._heartbeat_interval_s / 2))
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
                await self._renewed(error)
            if self._publisher.status.activity is status.activity:
                await self._publisher.next_activity(self._heartbeat_interval_s)

    async def _give_back(self, task: Task, reason: str, told: str = "") -> None:
        """Report a failure, then wait a little, so that a task that fails at once does not spin.

        `told` is what the aggregator hears of it, where that is not the reason.
        """
        self._publisher.show(last_error=reason)
        try:
            await self._client.report_failure(task.token, told or reason)
        except FedgrpcError as error:
            if error.retryable:
                raise
        await self._controls.wait(self._retries.next_delay_s())

    async def _say_goodbye(self, task: Task, reason: str = "the worker is shutting down") -> None:
        """Give the task back as the worker ends before it, for another to take. Do not wait long."""
        if not self._work.gives_back:
            return
        try:
            await self._client.report_failure(task.token, reason, _GOODBYE_S)
        except FedgrpcError as error:
            self._log.debug("goodbye not heard", reason=str(error))
        else:
            await leave(self._client)

    def _moved(self, progress: float) -> None:
        """Note that bytes went through, and show how far."""
        # A link that moves bytes works: the next failure is the first of its kind.
        self._retries.reset()
        now_s = time.monotonic()
        if now_s >= self._show_at_s or progress >= 1.0:
            self._show_at_s = now_s + _REPORT_INTERVAL_S
            self._publisher.show(progress=progress)


async def leave(client: AggregatorClient) -> None:
    """Tell the aggregator to wait for this worker no longer. A failure is only logged: the lease ends anyway."""
    try:
        await client.leave(_LEAVE_S)
    except FedgrpcError as error:
        log.debug("goodbye not heard", reason=str(error))

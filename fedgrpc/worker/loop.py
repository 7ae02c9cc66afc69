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
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.protocol.devices import Activity, DeviceProfile
from fedgrpc.protocol.tasks import Registration, registration_of
from fedgrpc.rpc.address import dialled
from fedgrpc.rpc.diagnosis import explain
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.v1 import aggregator_pb2, privacy_pb2
from fedgrpc.worker.client import AggregatorClient, Polled
from fedgrpc.worker.conditions import OwnersConditions
from fedgrpc.worker.leased_tasks import LeasedTasks
from fedgrpc.worker.local_work import LocalWork, TaskFiles
from fedgrpc.worker.membership import Membership, leave
from fedgrpc.worker.polling import Polling
from fedgrpc.worker.run_work import RunWork, WorkerRuns
from fedgrpc.worker.secure_part import answer
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import SpooledUpdate, check_folder
from fedgrpc.worker.status import Controls, StatusPublisher

# About ten seconds in all: a file that cannot be read for a moment (EIO, EMFILE) is readable again by then.
_TRIES_TO_READ: Final = 6
_UNREADABLE: Final = Backoff(first_s=0.5, cap_s=5.0)

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
        self._publisher = publisher
        self._controls = controls
        self._files = files
        self._work = work
        self._tls_flags = tls_flags
        self._runs = runs
        self._run_id = ""
        # Runs whose updates of a former process were sent in this session.
        self._delivered: set[str] = set()
        self._retries = Retries(settings.backoff)
        self._why = ""
        self._log: Any = log.bind(worker=settings.name)
        many = runs is not None
        self._membership = Membership(settings, client, publisher, files, work, profile, renew, many_runs=many)
        conditions = conditions or OwnersConditions(settings.name)
        self._polling = Polling(settings, client, publisher, controls, conditions, runs)
        self._tasks = LeasedTasks(settings, client, publisher, controls, self._membership, self._retries, runs)

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
                check_folder(self._settings.state_dir, error)
                error = await self._membership.renewed(error)
                reason = await self._explained(error)
            if self._controls.draining and not self._files.spool.count(self._run_id):
                return
            delay_s = self._retries.next_delay_s()
            self._publisher.show(last_error=reason)
            self._log.warning("disconnected", reason=reason, retry_in_s=round(delay_s, 2))
            await (asyncio.sleep(delay_s) if self._controls.draining else self._controls.wait(delay_s))

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
        registration = await self._membership.connect()
        own = RunWork(registration, self._files, self._work, own=True)
        if registration.run_id:
            for update in await self._unsent(registration):
                await self._tasks.deliver(own, update)
        self._delivered = {registration.run_id}
        while (polled := await self._polling.poll(own)) is not None:
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
            await self._tasks.give_back(task, "this device takes no tasks of this run")
            return
        await self._tasks.perform(run, task, message)

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
            await self._tasks.deliver(run, update)
        return bool(updates)

    async def _unsent(self, registration: Registration) -> list[SpooledUpdate]:
        """Return the updates of this run that are still to be sent. Wait a while for those that cannot be read."""
        retries = Retries(_UNREADABLE)
        updates = await asyncio.to_thread(self._files.spool.updates)
        while self._files.spool.unreadable and retries.failures < _TRIES_TO_READ:
            await self._controls.wait(retries.next_delay_s())
            updates = await asyncio.to_thread(self._files.spool.updates)
        # From here on, draining waits for the updates of this run alone.
        self._run_id = registration.run_id
        own = [update for update in updates if update.is_of(registration.run_id)]
        others = [update for update in updates if not update.is_of(registration.run_id)]
        await asyncio.to_thread(self._files.spool.keep_for_later, others, self._settings.spool_keep_s)
        return own

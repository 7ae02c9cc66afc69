"""Tasks under their leases: have a task carried out, keep its lease, deliver its update, or give it back.

The rule: the failure of a task is reported and ends nothing else. A lost link keeps the task, and the next session
resumes it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import structlog

from fedgrpc.aio import Interrupted, run_until_interrupted
from fedgrpc.errors import FedgrpcError, NameTaken, StorageError, TaskUnfit, UnknownWorker
from fedgrpc.protocol.tasks import Task
from fedgrpc.rpc.retry import Retries
from fedgrpc.trainer import Cancelled
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.caller import told_reason
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.delivery import Delivery
from fedgrpc.worker.membership import Membership, leave
from fedgrpc.worker.run_work import RunWork, WorkerRuns
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import SpooledUpdate, check_folder
from fedgrpc.worker.status import Controls, StatusPublisher

# Short: a process that gets SIGTERM is killed soon after, and the lease ends the task anyway.
_GOODBYE_S: Final = 2.0
_REPORT_INTERVAL_S: Final = 0.1
# A phase that is over sooner gets no heartbeat.
SETTLED_S: Final = 1.0

log = structlog.get_logger()


class LeasedTasks:
    """Carries out the tasks of one worker, one at a time. `retries` are those of its sessions."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
        controls: Controls,
        membership: Membership,
        retries: Retries,
        runs: WorkerRuns | None,
    ) -> None:
        """`runs` are those beside the aggregator's own one; None: the worker serves that one alone."""
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._controls = controls
        self._membership = membership
        self._retries = retries
        self._runs = runs
        self._deliveries: dict[str, Delivery] = {}
        self._show_at_s = 0.0
        self._log: Any = log.bind(worker=settings.name)

    async def perform(self, run: RunWork, task: Task, message: aggregator_pb2.Task) -> None:
        """Carry out one task, from download to acknowledgement. Raises what ends the session."""
        task_log = self._log.bind(run=task.run, round=task.round)
        task_log.info("task started", kind=task.kind.name.lower(), version=task.model_version)
        self._publisher.show(run=task.run, round=task.round, task_kind=task.kind)
        work = run.work.perform(task, message, self._moved)
        try:
            update = await run_until_interrupted(work, self._beat(task.token))
        except (Interrupted, Cancelled) as interruption:
            task_log.warning("task cancelled", reason=str(interruption) or "the learning task ended it")
        except asyncio.CancelledError:
            await self._say_goodbye(run, task)
            raise
        except TaskUnfit as error:
            told = told_reason(error, not task.metrics)
            if self._runs is not None and not run.own:
                await self.give_back(task, str(error), told)
                await self._runs.refuse(run, error)
                return
            await self._say_goodbye(run, task, told)
            raise
        except FedgrpcError as error:
            # A lost link keeps the task: the next session resumes it. A full disk here does not heal by connecting
            # again, so another worker gets the task.
            if error.retryable and not isinstance(error, StorageError):
                raise
            task_log.warning("task failed", reason=str(error))
            await self.give_back(task, str(error), told_reason(error, not task.metrics))
            check_folder(self._settings.state_dir, error)
        else:
            await self.deliver(run, update, new=True)
        finally:
            self._publisher.show(task_kind=None)

    async def deliver(self, run: RunWork, update: SpooledUpdate, new: bool = False) -> None:
        """Send an update; `new`: it was made in this session. Raises what ends the session."""
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
            await asyncio.sleep(min(SETTLED_S, self._membership.heartbeat_interval_s / 2))
            status = self._publisher.status
            try:
                beat = await self._client.heartbeat(token, status.activity.phase, status.progress)
                if beat.cancel:
                    return beat.reason or "cancelled by the aggregator"
            except UnknownWorker:
                await self._membership.register()
            except FedgrpcError as error:
                if not error.retryable or isinstance(error, NameTaken):
                    return str(error)
                self._log.debug("heartbeat failed", reason=str(error))
                await self._membership.renewed(error)
            if self._publisher.status.activity is status.activity:
                await self._publisher.next_activity(self._membership.heartbeat_interval_s)

    async def give_back(self, task: Task, reason: str, told: str = "") -> None:
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

    async def _say_goodbye(self, run: RunWork, task: Task, reason: str = "the worker is shutting down") -> None:
        """Give the task back as the worker ends before it, for another to take. Do not wait long."""
        if not run.work.gives_back:
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

"""Polls of a worker: wait until the device may take a task, tell what it holds of each run, and ask.

The rule: a paused device does not poll, nor one that its owner keeps for other things now, nor one that drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import AsyncExitStack
from typing import Final

import structlog

from fedgrpc.aio import Interrupted, run_until_interrupted
from fedgrpc.errors import StorageError
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.devices import Activity
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.v1 import device_pb2
from fedgrpc.worker.client import AggregatorClient, HeldOfRun, Polled
from fedgrpc.worker.conditions import OwnersConditions
from fedgrpc.worker.membership import leave
from fedgrpc.worker.run_work import RunWork, WorkerRuns
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.status import Controls, StatusPublisher

# How often a device that waits for its own conditions looks again.
_LOOK_AGAIN_S: Final = 20.0

log = structlog.get_logger()


class Polling:
    """Polls for one worker, which serves `runs` beside the aggregator's own one; None: that one alone."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
        controls: Controls,
        conditions: OwnersConditions,
        runs: WorkerRuns | None,
    ) -> None:
        """`conditions` measures the device before each poll, and says whether it takes tasks."""
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._controls = controls
        self._conditions = conditions
        self._runs = runs
        self._log = log.bind(worker=settings.name)

    async def poll(self, own: RunWork) -> Polled | None:
        """Return the answer to a poll; None when the worker is to drain. `own`: the aggregator's own run."""
        async with AsyncExitStack() as stack:
            new_examples = None
            if own.run_id:
                new_examples = await stack.enter_async_context(own.work.polling(own.registration))
                await self._describe(own)
            others = []
            for run in () if self._runs is None else self._runs.opened:
                new = await stack.enter_async_context(run.work.polling(run.registration))
                others.append(HeldOfRun(run.run_id, run.files.models.held, new, await self._keys(run)))
            keys = await self._keys(own) if own.run_id else None
            return await self._poll_unless_paused(own, new_examples, others, keys)

    async def _describe(self, own: RunWork) -> None:
        """Tell the aggregator of the model before a poll that may bring the first task, once unless it changes."""
        if not own.registration.describe_model:
            return
        description = await own.work.description(own.registration)
        if description is not None and description != own.described:
            await self._client.describe(description)
            own.described = description

    async def _keys(self, run: RunWork) -> PublicKeys | None:
        """Return this device's keys for the next secure sum of a run; None: it takes part in none."""
        if self._settings.role is not WorkerRole.TRAINER:
            return None
        try:
            return await asyncio.to_thread(run.files.one_time_keys, run.run_id)
        except StorageError as error:
            self._log.warning("no keys for secure sums", reason=str(error))
            return None

    async def _poll_unless_paused(
        self,
        own: RunWork,
        new_examples: int | None,
        others: Collection[HeldOfRun],
        keys: PublicKeys | None,
    ) -> Polled | None:
        wait_s = min(own.registration.poll_wait_s or self._settings.poll_wait_s, self._settings.poll_wait_s)
        while not self._controls.draining:
            if self._controls.paused:
                self._publisher.enter(Activity.PAUSED)
                await self._controls.changed()
                continue
            conditions = await self._until_willing()
            if self._controls.draining or self._controls.paused:
                continue
            self._publisher.enter(Activity.WAITING)
            poll = self._client.poll(wait_s, own.files.models.held, new_examples, others, conditions, keys)
            try:
                return await run_until_interrupted(poll, self._controls.changed())
            except Interrupted:
                continue
        return None

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

"""The link to the aggregator above: a worker's loop whose local work is a round with workers of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from fedgrpc.codec.layout import Array, Layout
from fedgrpc.errors import TaskError
from fedgrpc.hierarchy.branch import Branches
from fedgrpc.hierarchy.desk import Order
from fedgrpc.hierarchy.mean import sending
from fedgrpc.trainer import Trainer
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.client import AggregatorClient, Polled
from fedgrpc.worker.device import DeviceProfile, detect
from fedgrpc.worker.loop import Loop
from fedgrpc.worker.model_store import ModelFolder
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import Spool, SpooledUpdate
from fedgrpc.worker.status import Activity, Controls, StatusPublisher
from fedgrpc.worker.task import Registration, Task, TaskKind
from fedgrpc.worker.update import Began

# Of the time that the task leaves, for its own upload: a tenth, or half as much again as the last one took.
_RESERVED: Final = 0.1
_LAST_UPLOADS: Final = 1.5
_DEVICE_CLASS: Final = "aggregator"


class Link(Loop):
    """A worker's loop that trains nothing itself, and leaves models on the disk until they are read."""

    _TLS_FLAGS = "--upstream-tls"

    def __init__(
        self, settings: WorkerSettings, client: AggregatorClient, publisher: StatusPublisher, branches: Branches
    ) -> None:
        """Raises `StorageError` for a state folder that cannot be used."""
        super().__init__(
            settings,
            client,
            publisher,
            Controls(),
            Spool(
                settings.state_dir / "spool",
                max_updates=settings.spool_max_updates,
                max_bytes=settings.spool_max_bytes,
            ),
            ModelFolder(settings.state_dir / "model"),
            _trains_nothing,
            self._measured,
        )
        self._branches = branches

    def _measured(self) -> DeviceProfile:
        return detect().with_overrides({"device_class": _DEVICE_CLASS, **self._settings.device})

    async def _lazily(self, task: Task) -> tuple[Layout, Mapping[str, Array], float]:
        """The task's model, left on the disk until it is read, and the seconds that its download took."""
        held, download_s = await self._hold(task)
        return held.manifest.layout, await asyncio.to_thread(held.tensors), download_s

    async def _say_goodbye(self, task: Task, reason: str = "") -> None:
        """Nothing is given back at the end of the process: the next one goes on with it."""


class LeafLoop(Link):
    """Takes tasks from above while there are enough workers below, and sends what their rounds make of them."""

    async def _connect(self) -> Registration:
        registration = await self._register()
        await self._branches.lead(registration)
        self._log.info("connected", run=registration.run, aggregator=self._settings.aggregator)
        return registration

    async def _next_answer(self, registration: Registration) -> Polled | None:
        """A task is asked for once there are workers for it: the one above counts on whoever polls."""
        self._publisher.enter(Activity.WAITING)
        desk = self._branches.present.desk
        if not desk.resuming:
            await desk.crew.wait()
        answer = await super()._next_answer(registration)
        desk.resuming = False
        return answer

    async def _work(self, task: Task, message: aggregator_pb2.Task) -> SpooledUpdate:
        """Download, have a round below, and spool the mean."""
        branch = self._branches.of(task.run_id)
        if not task.plan.sub_model.whole or task.plan.compression is not None:
            raise TaskError("an aggregator takes the whole model as it is")
        nothing: tuple[Layout, Mapping[str, Array], float] = ((), {}, 0.0)
        layout, given, download_s = nothing if task.kind is TaskKind.INITIALIZE else await self._lazily(task)
        began = Began(download_s, time.monotonic())
        self._publisher.enter(Activity.EVALUATING if task.kind is TaskKind.EVALUATE else Activity.TRAINING)
        order = Order(message, layout, given, self._due_at(task))
        watching = asyncio.create_task(branch.watch(lambda progress: self._publisher.show(progress=progress)))
        try:
            mean = await branch.desk.carry_out(order)
        except asyncio.CancelledError:
            # Whoever ends the process ends no round: that is on the disk, and goes on after a restart.
            if not self._branches.closing:
                branch.desk.withdraw(order, "the aggregator above no longer wants it")
            raise
        finally:
            watching.cancel()
        residual = await asyncio.to_thread(self._spool.residual, task.run_id)
        fill = sending(task, self._settings.name, mean, residual, began)
        update = await asyncio.to_thread(self._spool.write, message, fill)
        self._show_disk()
        return update

    def _due_at(self, task: Task) -> float | None:
        if task.deadline_s is None:
            return None
        left_s = max(0.0, task.deadline_s - time.monotonic())
        upload_s = max(_RESERVED * left_s, _LAST_UPLOADS * self._publisher.status.last_timings.upload_s)
        return task.deadline_s - min(upload_s, left_s / 2)


def _trains_nothing(registration: Registration) -> Trainer:
    raise TaskError("an aggregator has no learning task of its own")

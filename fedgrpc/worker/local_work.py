"""The work of a task, apart from the loop that takes the task and delivers its update.

    LocalWork    protocol: the interface between a loop and the work of its tasks
    TaskFiles    the model a task starts from, and the update it ends with, on this device's disk

`training.TrainerWork` trains with the user's learning task. `fedgrpc.hierarchy.upstream` has those of a leaf.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Protocol

from fedgrpc.algorithms.combinations import counts_differences_alone
from fedgrpc.codec.feedback import Residual
from fedgrpc.errors import CorruptError, LayoutError, StorageError, WrongOffset
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import Activity
from fedgrpc.protocol.secure import check_common, secure_terms_from_proto
from fedgrpc.protocol.tasks import Registration, Task
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rpc.retry import with_retries
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.caller import Report
from fedgrpc.worker.certified_keys import CertifiedKeys
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.held_model import HeldModel, Source
from fedgrpc.worker.model_folder import ModelFolder
from fedgrpc.worker.secure_memory import SecureMemory
from fedgrpc.worker.secure_part import SecurePart
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import Fill, Spool, SpooledUpdate
from fedgrpc.worker.status import StatusPublisher

_TRIES_TO_DOWNLOAD: Final = 3
_TRIES_TO_SPOOL: Final = 5


class LocalWork(Protocol):
    """Carries out the tasks of one loop, one at a time."""

    @property
    def gives_back(self) -> bool:
        """True if the end of the process gives its task back, for another worker to take."""

    @property
    def parts(self) -> frozenset[str]:
        """The parts of a local-model plan that this work can do."""

    async def prepare(self, registration: Registration) -> bool:
        """Get ready for tasks of the registered run. True: the device's profile or `parts` may have changed."""

    async def description(self, registration: Registration) -> ModelDescription | None:
        """Return what to tell the registered run about the model now; None: nothing. Called before each poll."""

    def polling(self, registration: Registration) -> AbstractAsyncContextManager[int | None]:
        """Context of each request for a task. Entering it waits until a task can be taken.

        It gives how many examples there are that this run has not been trained on; None where that is not known.
        """

    async def perform(self, task: Task, message: aggregator_pb2.Task, report: Report) -> SpooledUpdate:
        """Carry out a task and spool its update; `report` is called as the model downloads, with 0 to 1.

        Raises `TaskError` for a task that cannot be carried out here. A cancellation ends the work.
        """


class TaskFiles:
    """Downloads the model of a task and spools its update; shows both in the worker's status."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
    ) -> None:
        """Open what is on the disk. Raises `StorageError`, and `UsageError` as `CertifiedKeys.of`."""
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._download_began: tuple[str, float] = ("", 0.0)
        self.models = ModelFolder(settings.state_dir / "model")
        self.secure = SecureMemory(settings.state_dir / "secure")
        self._certified = CertifiedKeys.of(settings)
        self.spool = Spool(
            settings.state_dir / "spool",
            max_updates=settings.spool_max_updates,
            max_bytes=settings.spool_max_bytes,
        )

    def show(self) -> None:
        """Show what is on the disk."""
        held = self.models.held
        version = 0 if held is None else held.version
        self._publisher.show(model_version=version, spooled_updates=self.spool.count())

    def secure_part(self, task: Task, message: aggregator_pb2.Task, built_from: Registration) -> SecurePart:
        """Return this device's part in the secure sum that a task is of.

        `built_from`: what the learning task was built from. Blocks. Raises `LayoutError` and `UpdateRefused` for a
        sum that this device does not join, and `StorageError`.
        """
        if task.kind is not TaskKind.TRAIN or message.HasField("local_model"):
            # What stays on the device, as personal layers do, would be in the sum.
            raise LayoutError("a secure sum is of updates of the whole model: no other task names one")
        if not counts_differences_alone(task.plan):
            # What former tasks have left on this device is known to no other one.
            raise LayoutError(f"a secure sum is of differences alone, and {task.plan.algorithm} has more")
        settings = self._settings
        terms = secure_terms_from_proto(
            message.secure, settings.name, settings.secure_colluding, settings.secure_min_workers
        )
        check_common(terms.common, message, built_from)
        if self._certified is not None:
            self._certified.check(task.run_id, terms.circle.neighbours)
        return SecurePart(self.secure, self._client, task.token, terms)

    def one_time_keys(self, run_id: str) -> PublicKeys:
        """Return this device's keys for the next secure sum of a run, signed if it has a certificate. Blocks.

        Raises `StorageError`.
        """
        keys = self.secure.public_keys()
        return keys if self._certified is None else self._certified.signed(run_id, keys)

    async def download(self, task: Task, report: Report, most_bytes: int | None = None) -> tuple[HeldModel, float]:
        """Return the task's version, on the disk, and the seconds since its download began, in any session.

        Raises `TooLargeError` for a version of more than `most_bytes`, before any of its bytes are taken.
        """
        self._publisher.enter(Activity.DOWNLOADING)
        if self._download_began[0] != task.token:
            self._download_began = (task.token, time.monotonic())
        source = Source(task.run_id, task.model_version, task.sub_model.name)

        self.models.limit(most_bytes)

        async def checked() -> HeldModel:
            held = await self._client.pulls.pull(self.models, source, task.token, report)
            await asyncio.to_thread(self.models.check_held)
            return held

        held = await with_retries(
            checked,
            attempts=_TRIES_TO_DOWNLOAD,
            backoff=self._settings.backoff,
            retry_on=(CorruptError, WrongOffset),
        )
        self.show()
        return held, time.monotonic() - self._download_began[1]

    async def store(
        self,
        task: Task,
        message: aggregator_pb2.Task,
        fill: Callable[[Residual], Fill],
        keep_personal: Callable[[Path], None] | None = None,
        keep: Callable[[Path], None] | None = None,
    ) -> SpooledUpdate:
        """Spool the update of a task; `fill` gets the residual that the update has to make good, in a thread.

        `keep_personal` and `keep` are as in `Spool.write`.
        """

        def write() -> SpooledUpdate:
            return self.spool.write(message, fill(self.spool.residual(task.run_id)), keep_personal, keep)

        # A full disk may have room again in a moment, and the work may have taken hours.
        update = await with_retries(
            lambda: asyncio.to_thread(write),
            attempts=_TRIES_TO_SPOOL,
            backoff=self._settings.backoff,
            retry_on=(StorageError,),
        )
        self.show()
        return update

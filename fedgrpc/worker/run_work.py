"""State of a worker for each run of an aggregator that has many: its files, its learning task, what it told.

    spool/, model/       of the run that the aggregator was started with, if it has one
    runs/ID/             of every other run: the same two folders (`fedgrpc.worker.local_work.TaskFiles`)

The rule: a spool, a residual, personal layers and held models belong to one run, under its id. Of learning tasks
the last few stay in memory, and are built again when their run has work.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from fedgrpc.errors import FedgrpcError
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.tasks import Registration, registration_of
from fedgrpc.storage.files import make_private, remove_folder, storage_errors
from fedgrpc.trainer import Trainer
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.caller import told_reason
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.local_work import LocalWork, TaskFiles
from fedgrpc.worker.secure_memory import SecureMemory
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.status import StatusPublisher
from fedgrpc.worker.training import TrainerWork

# Learning tasks in memory, and folders of runs on the disk.
_MOST_TRAINERS: Final = 2
_MOST_FOLDERS: Final = 32
_FOLDER: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

log = structlog.get_logger()


@dataclass
class RunWork:
    """Files and work of one run. `described` is what the aggregator was told of its model in this session.

    `own`: it is the run that the aggregator named at registration.
    """

    registration: Registration
    files: TaskFiles
    work: LocalWork
    own: bool = False
    described: ModelDescription | None = None

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.registration.run_id


class WorkerRuns:
    """The runs of one worker beside the aggregator's own one. One owner: the worker's loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
        build_trainer: Callable[[Registration], Trainer],
    ) -> None:
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._build_trainer = build_trainer
        self._folder = settings.state_dir / "runs"
        self._opened: dict[str, RunWork] = {}
        # Runs whose learning task is in memory, the one used last at the end.
        self._built: list[str] = []

    @property
    def opened(self) -> list[RunWork]:
        """Runs that this process has had work of."""
        return list(self._opened.values())

    def knows(self, run_id: str) -> bool:
        """Return whether this device has had work of a run, also in a former process."""
        return run_id in self._opened or (self._folder / _name_of(run_id)).exists()

    def secure_memory(self, run_id: str) -> SecureMemory:
        """Return what this device fixed of the secure sums of a run, also in a former process."""
        known = self._opened.get(run_id)
        return SecureMemory(self._folder / _name_of(run_id) / "secure") if known is None else known.files.secure

    async def of_task(self, own: Registration, task: aggregator_pb2.Task) -> RunWork | None:
        """Return the work of a task's run; None if nothing says what the run is. Raises `StorageError`."""
        known = self._opened.get(task.run_id)
        if known is not None or not task.terms.run_id:
            return known
        return await self.open(registration_of(own, task.terms))

    async def open(self, registration: Registration) -> RunWork:
        """Return the files and the work of a run, without its learning task. Raises `StorageError`."""
        known = self._opened.get(registration.run_id)
        if known is None:
            folder = self._folder / _name_of(registration.run_id)
            known = await asyncio.to_thread(self._open, folder, registration)
            self._opened[registration.run_id] = known
        known.registration = registration
        return known

    def _open(self, folder: Path, registration: Registration) -> RunWork:
        with storage_errors(folder):
            make_private(self._folder)
            self._make_room(folder)
            make_private(folder)
            # The order of the last use, over restarts.
            folder.touch()
        settings = replace(self._settings, state_dir=folder)
        files = TaskFiles(settings, self._client, self._publisher)
        return RunWork(registration, files, TrainerWork(settings, files, self._publisher, self._build_trainer))

    def _make_room(self, wanted: Path) -> None:
        """Remove the folders that were not used for the longest time; those of unsent updates are kept a while."""
        in_use = {_name_of(run_id) for run_id in self._opened} | {wanted.name}
        others = [path for path in self._folder.iterdir() if path.is_dir() and path.name not in in_use]
        others.sort(key=lambda path: path.stat().st_mtime)
        for path in others[: max(0, len(others) + len(in_use) - _MOST_FOLDERS)]:
            unsent = any((path / "spool").glob("0*"))
            if not unsent or time.time() - path.stat().st_mtime > self._settings.spool_keep_s:
                log.info("run forgotten", folder=str(path), unsent_updates=unsent)
                remove_folder(path)

    async def prepare(self, run: RunWork) -> str:
        """Build the learning task of a run, unless it is in memory.

        Return why this device takes no tasks of the run, which the aggregator is then told; "": it does.
        """
        work = run.work
        assert isinstance(work, TrainerWork)
        if run.run_id in self._built:
            self._built.remove(run.run_id)
        while len(self._built) >= _MOST_TRAINERS:
            oldest = self._opened[self._built.pop(0)].work
            assert isinstance(oldest, TrainerWork)
            await oldest.release()
        try:
            await work.prepare(run.registration)
        except FedgrpcError as error:
            if error.retryable:
                raise
            await self.refuse(run, error)
            return str(error)
        self._built.append(run.run_id)
        return ""

    async def describe(self, run: RunWork) -> None:
        """Tell the aggregator of the model of a run that is prepared."""
        description = await run.work.description(run.registration)
        await self._client.describe(description or ModelDescription(), run.run_id)

    async def refuse(self, run: RunWork, error: FedgrpcError) -> None:
        """Tell the aggregator that this device takes no tasks of a run."""
        log.warning("run refused", run=run.registration.run, reason=str(error))
        reason = told_reason(error, run.registration.without_metrics)
        await self._client.describe(ModelDescription(), run.run_id, reason)


def _name_of(run_id: str) -> str:
    """Return the name of a run's folder: an id comes from the aggregator, and names no other folder."""
    return run_id if _FOLDER.fullmatch(run_id) else hashlib.sha256(run_id.encode()).hexdigest()[:32]

"""The aggregator of a leaf, one for each run of its parent.

    run-ID/             the data folder of the run of that id
    registration.pb     the parent's last registration answer, which names its run

The rule: versions and rounds are those of one run of the parent. Another run starts with an empty folder, and the
folder of the former one is removed. With the registration on the disk, workers are served also while the parent is
away.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import LinkError, StorageError
from fedgrpc.hierarchy.handoff import TaskHandoff
from fedgrpc.hierarchy.parent_rounds import ParentRounds
from fedgrpc.identity.folder import IDENTITY
from fedgrpc.metrics import ProcessMetrics
from fedgrpc.protocol.tasks import Registration, registration_from_proto
from fedgrpc.runs.events import Ending, EndReason, RunPhase
from fedgrpc.storage.files import storage_errors, write_file
from fedgrpc.v1.aggregator_pb2 import RegisterResponse

_FOLDER: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
# A leaf's run ends when its parent's does, after however many rounds.
_ENDLESS: Final = 1 << 31

log = structlog.get_logger()

Ready = Callable[[int], None] | None


class LeafRun:
    """The aggregator of one run of the parent, from the moment that workers are served."""

    def __init__(
        self, settings: AggregatorSettings, run_id: str, metrics: ProcessMetrics, identity_dir: Path
    ) -> None:
        self.run_id = run_id
        # After a round has closed, its devices answer for their masks. One that dies takes a lease.
        self.answers_s = settings.policy.lease_s if settings.sums_here else 0.0
        self.handoff = TaskHandoff()
        rounds = partial(ParentRounds, handoff=self.handoff, run_id=run_id)
        self.aggregator = Aggregator(settings, metrics, rounds, identity_dir)
        self.running: asyncio.Task[int] | None = None

    async def start(self, ready: Ready) -> None:
        """Serve workers. Raises as `Aggregator.run`."""
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.running = asyncio.create_task(self.aggregator.run(port.set_result))
        await asyncio.wait([self.running, port], return_when=asyncio.FIRST_COMPLETED)
        if not port.done():
            self.running.result()
            raise StorageError("the aggregator ended before it served")
        if ready is not None:
            ready(port.result())

    async def watch(self, show: Callable[[float], None]) -> None:
        """Call `show` with the share of the present round's updates that are in, 0 to 1, at each change."""
        coordinator = self.aggregator.coordinator
        assert coordinator is not None
        seen = -1
        while True:
            seen = await coordinator.changes.wait(seen)
            if coordinator.machine.round is not None:
                state = coordinator.machine.round.state
                show(min(1.0, state.accepted_count / max(1, state.aim)))

    async def finish(self, reason: str) -> None:
        """End the run, and tell its workers."""
        assert self.aggregator.coordinator is not None
        ending = Ending(EndReason.PARENT_ENDED, reason)
        await self.aggregator.coordinator.end(RunPhase.FINISHED, ending)


class LeafRuns:
    """The present run of the parent, and the change to another one. `serving` is set while workers are served."""

    def __init__(self, settings: AggregatorSettings, metrics: ProcessMetrics, ready: Ready) -> None:
        self._settings = settings
        self._metrics = metrics
        self._ready = ready
        self._kept = settings.data_dir / "registration.pb"
        self._present: LeafRun | None = None
        self.ended = asyncio.Event()
        self.serving = asyncio.Event()
        self.closing = False

    @property
    def present(self) -> LeafRun:
        """The run that the link is connected to."""
        assert self._present is not None
        return self._present

    def of(self, run_id: str) -> LeafRun:
        """Return the run of that id. Raises `LinkError` if it is not the present one, or not yet served."""
        if self._present is None or self._present.run_id != run_id or self.coordinator is None:
            raise LinkError("the parent leads another run now")
        return self._present

    @property
    def coordinator(self) -> Coordinator | None:
        """Coordinator of the present run; None if there is none."""
        return None if self._present is None else self._present.aggregator.coordinator

    async def resume(self) -> None:
        """Serve the workers of the run that this process's predecessor served, if any. Raises as `lead`."""
        registration = await asyncio.to_thread(self._read)
        if registration is not None:
            await self._begin(registration)

    async def lead(self, registration: Registration) -> None:
        """Serve workers for this run of the parent. Raises as `Aggregator.run`."""
        if self._present is not None and self._present.run_id == registration.run_id:
            return
        if self._present is not None:
            log.warning("the parent leads another run", run=registration.run)
            former, self._present = self._present, None
            self.serving.clear()
            # Wake those who wait for evaluators of the former run: they look again.
            former.handoff.evaluators.set()
            former.aggregator.stop()
            assert former.running is not None
            await former.running
        await asyncio.to_thread(self._write, registration)
        await self._begin(registration)

    async def _begin(self, registration: Registration) -> None:
        settings = self._settings
        folder = self._folder(registration.run_id)
        await asyncio.to_thread(self._remove_others, folder)
        settings = replace(
            settings,
            data_dir=folder,
            run_name=registration.run,
            rounds=_ENDLESS,
            learning_task=settings.learning_task or registration.learning_task,
            model=settings.model or registration.model,
        )
        run = LeafRun(settings, registration.run_id, self._metrics, self._settings.data_dir / IDENTITY)
        self._present = run
        await run.start(self._ready)
        self.serving.set()
        assert run.running is not None
        run.running.add_done_callback(lambda _: self._over(run))

    def _over(self, run: LeafRun) -> None:
        if self._present is run:
            self.ended.set()

    def close(self, signal_number: int = 0) -> None:
        """Drain the present run. A second call ends the process at once."""
        self.closing = True
        if self._present is None:
            self.ended.set()
        else:
            self._present.aggregator.stop(signal_number)

    async def result(self) -> int:
        """Return the present run's exit code, once it has ended. Raises what ended it."""
        return 0 if self._present is None or self._present.running is None else await self._present.running

    def _folder(self, run_id: str) -> Path:
        name = run_id if _FOLDER.fullmatch(run_id) else hashlib.sha256(run_id.encode()).hexdigest()[:32]
        return self._settings.data_dir / f"run-{name}"

    def _remove_others(self, folder: Path) -> None:
        for other in self._settings.data_dir.glob("run-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _read(self) -> Registration | None:
        with storage_errors(self._kept):
            if not self._kept.exists():
                return None
            try:
                return registration_from_proto(RegisterResponse.FromString(self._kept.read_bytes()))
            except DecodeError as error:
                raise StorageError(f"cannot read {self._kept}: {error}") from error

    def _write(self, registration: Registration) -> None:
        message = RegisterResponse(
            run=registration.run,
            run_id=registration.run_id,
            learning_task=registration.learning_task,
            model=registration.model,
        )
        with storage_errors(self._kept):
            write_file(self._kept, message.SerializeToString())

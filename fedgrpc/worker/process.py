"""The worker process: its folder, connection, service and loop, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Final

import structlog

from fedgrpc.process import on_end_signal, reuse_memory
from fedgrpc.protocol.devices import Activity, DeviceProfile, Status
from fedgrpc.protocol.tasks import Registration
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.identity import Session
from fedgrpc.rpc.server import WORKER, RunningServer, serve, worker_service
from fedgrpc.storage.folder import HeldFolder, folder_id, hold_folder
from fedgrpc.trainer import Trainer
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.conditions import OwnersConditions
from fedgrpc.worker.device import detect
from fedgrpc.worker.enrolment import WorkerLink, enrolled, linked
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.local_work import TaskFiles
from fedgrpc.worker.loop import Loop
from fedgrpc.worker.model_folder import ModelFolder
from fedgrpc.worker.released_models import ReleasedModels
from fedgrpc.worker.releases import ReleaseFollower
from fedgrpc.worker.run_work import WorkerRuns
from fedgrpc.worker.service import WorkerService
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.status import Controls, StatusPublisher
from fedgrpc.worker.training import TrainerWork

IN_USE: Final = "is used by another worker; give each worker its own --state-dir"
# Wait this long after `stop` before leaving behind what does not end.
_ABANDON_S: Final = 0.2
_STOP_THREAD_S: Final = 5.0

BuildTrainer = Callable[[Registration], Trainer]

log = structlog.get_logger()


class Worker:
    """One worker. `run` it once; the other methods may be called from its event loop meanwhile."""

    def __init__(self, settings: WorkerSettings, build_trainer: BuildTrainer) -> None:
        self._settings = settings
        self._build_trainer = build_trainer
        self._running: asyncio.Task[None] | None = None
        self._joining: asyncio.Task[WorkerSettings] | None = None
        self._exit_code = 0
        self.controls = Controls()
        self.publisher = StatusPublisher(Status(settings.name, settings.aggregator))
        self.server: RunningServer | None = None

    async def run(self) -> int:
        """Run until the run has ended or the worker has drained (0), or was stopped before (128 + signal).

        Raises:
            UsageError: a setting is unusable, or the state folder or the port is in use.
            FedgrpcError: the aggregator refuses this worker for good, or its learning task cannot be built.
        """
        settings = self._settings
        reuse_memory()
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(hold_folder(settings.state_dir, IN_USE))
            if (known := await self._enrolled()) is None:
                return self._exit_code
            self._settings = settings = known
            self.publisher.show(worker=settings.name)
            link = await stack.enter_async_context(linked(settings))
            client = AggregatorClient(
                link.channel,
                settings.name,
                settings.throttle,
                settings.stall_s,
                settings.encodings,
                session=Session.begin(folder_id(settings.state_dir)),
            )
            link.serve(client)
            files = TaskFiles(settings, client, self.publisher)
            work = TrainerWork(settings, files, self.publisher, self._build_trainer)
            runs = WorkerRuns(settings, client, self.publisher, self._build_trainer)
            loop = Loop(
                *(settings, client, self.publisher, self.controls, files, work, self._profile),
                renew=link.on_stale,
                runs=runs,
                conditions=OwnersConditions(settings.name, settings.only_when),
            )
            released = ReleasedModels(settings.state_dir / "released")

            async def score(run_id: str, model: HeldModel) -> Mapping[str, float]:
                """Score with the learning task of that very run."""
                works = {run.run_id: run.work for run in runs.opened} | {loop.run_id: work}
                own = works.get(run_id)
                return await own.score(run_id, model) if isinstance(own, TrainerWork) else {}

            def takes(run_id: str) -> bool:
                return run_id == loop.run_id or runs.knows(run_id)

            follower = ReleaseFollower(client.releases, client.pulls, released, self.publisher, score, takes)
            await self._serve(stack, files.models, released)
            return await self._run_loop(loop, folder, link, follower)

    async def _enrolled(self) -> WorkerSettings | None:
        """Return the settings that the device's certificate decides; None when told to end before there is one."""
        self._joining = joining = asyncio.create_task(enrolled(self._settings))
        await asyncio.wait([joining])
        self._joining = None
        return None if joining.cancelled() else joining.result()

    async def _serve(self, stack: AsyncExitStack, models: ModelFolder, released: ReleasedModels) -> None:
        address = self._settings.serve_address
        if address is None:
            return
        service = worker_service(WorkerService(self.publisher, models, released, self))
        server = serve(address, [service], tls=self._settings.serve_tls, grace_s=0.5)
        self.server = await stack.enter_async_context(server)
        if not Address.parse(address).is_local:
            log.warning("anybody may call", address=address, reason="this device's service knows no callers")
        await self.server.health.set(WORKER, True)
        log.info("serving", worker=self._settings.name, address=self.server.address)

    async def _run_loop(self, loop: Loop, folder: HeldFolder, link: WorkerLink, follower: ReleaseFollower) -> int:
        self._running = running = asyncio.create_task(loop.run())
        guarding = asyncio.create_task(folder.until_removed())
        renewing = asyncio.create_task(link.keep_fresh())
        following = asyncio.create_task(follower.run())
        tasks = (guarding, renewing, running, following)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()
        return self._exit_code

    def _profile(self) -> DeviceProfile:
        rate = int(self._settings.throttle.link_bits_per_second or 0)
        link = {"uplink_bits_per_second": rate, "downlink_bits_per_second": rate} if rate else {}
        return detect().with_overrides({**link, **self._settings.device})

    def pause(self) -> None:
        """Take no further task until `resume`. The present one is finished."""
        self.controls.pause()

    def resume(self) -> None:
        """Take tasks again."""
        self.controls.resume()

    def drain(self, within_s: float | None = None, exit_code: int = 0) -> None:
        """Finish the present task, then end.

        After `within_s` the task is stopped: training is given back, an upload stays in the spool for the next
        start.
        """
        self.controls.drain()
        if self._joining is not None:
            # There is no task to finish.
            self._exit_code = exit_code
            self._joining.cancel()
        if self.publisher.status.task_kind is None:
            self.publisher.enter(Activity.DRAINING)
        if within_s is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(within_s, self._cancel, exit_code)
            # A second cancellation leaves behind a training thread that has not stopped by then.
            loop.call_later(within_s + _STOP_THREAD_S, self._cancel, exit_code)

    def stop(self, exit_code: int = 0) -> None:
        """End at once. Finished updates are on the disk."""
        self._cancel(exit_code)
        asyncio.get_running_loop().call_later(_ABANDON_S, self._cancel, exit_code)

    def on_end_signal(self, number: int) -> None:
        """Handle a signal: the first drains within `drain_s`, a second ends at once."""
        if self.controls.draining:
            self.stop(128 + number)
            return
        log.info("draining", worker=self._settings.name, within_s=self._settings.drain_s, again="ends at once")
        self.drain(self._settings.drain_s, 128 + number)

    def _cancel(self, exit_code: int) -> None:
        if self._running is not None and not self._running.done():
            self._exit_code = exit_code
            self._running.cancel()


async def run_worker(
    settings: WorkerSettings, trainer: Trainer | None = None, *, build_trainer: BuildTrainer | None = None
) -> int:
    """Run a worker to its end and return the exit code. In the main thread, SIGTERM and SIGINT drain it.

    Give the trainer, or a function that builds it from the registration (`learning_task`, `model`). The function
    runs in a thread.

    Raises: as `Worker.run`.
    """
    if trainer is not None:
        worker = Worker(settings, lambda registration: trainer)
    elif build_trainer is not None:
        worker = Worker(settings, build_trainer)
    else:
        raise TypeError("a worker needs a trainer, or a way to build one")
    with on_end_signal(worker.on_end_signal):
        return await worker.run()

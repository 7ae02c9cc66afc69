"""A whole aggregator: its data folder, its server, its driver, and how it ends."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Driver, Rounds
from fedgrpc.aggregator.model_service import ModelService
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.own_rounds import OwnRounds
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.run_models import RunModels
from fedgrpc.aggregator.service import AggregatorService
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings, settings_text
from fedgrpc.aggregator.trust import Trust
from fedgrpc.aio import Changes
from fedgrpc.errors import UsageError
from fedgrpc.identity.audit import AuditEntry
from fedgrpc.identity.folder import IDENTITY as IDENTITY_FOLDER
from fedgrpc.identity.folder import warn_if_open
from fedgrpc.metrics import Metrics
from fedgrpc.process import on_end_signal, reuse_memory
from fedgrpc.rpc.server import (
    AGGREGATOR,
    Health,
    RunningServer,
    aggregator_service,
    models_service,
    serve,
)
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.folder import HeldFolder, hold_folder
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.uploads import UploadJournal

log = structlog.get_logger()

_HEALTH_INTERVAL_S = 1.0
# What runs beside the server while it serves; it gets the address of the operators' socket.
Beside = Callable[[Trust, str], AbstractAsyncContextManager[object]]


class Aggregator:
    """One aggregator. `run` it once; `stop` may be called from its event loop meanwhile."""

    def __init__(
        self,
        settings: AggregatorSettings,
        metrics: Metrics | None = None,
        rounds: Rounds = OwnRounds,
        identity_dir: Path | None = None,
        beside: Beside = lambda trust, address: nullcontext(),
    ) -> None:
        """`identity_dir` is the folder of members and keys; None: one in the data folder."""
        self._beside = beside
        self._settings = settings
        self._identity_dir = identity_dir or settings.data_dir / IDENTITY_FOLDER
        self._rounds = rounds
        self._metrics = metrics or Metrics()
        self._stopping = asyncio.Event()
        self._signals = 0
        self.clock: Callable[[], float] = time.monotonic
        self.coordinator: Coordinator | None = None
        self.trust: Trust | None = None
        self.models: RunModels | None = None
        self.port = 0

    async def run(self, ready: Callable[[int], None] | None = None) -> int:
        """Serve until the run has ended and its workers know (0), or until told to stop (128 + signal).

        `ready` is called with the port once workers are served. Raises `UsageError` for a setting or a data
        folder that cannot be used, and `StorageError` for one that is corrupt.
        """
        settings = self._settings
        _raise_file_limit()
        reuse_memory()
        with hold_folder(settings.data_dir, "is in use by another aggregator", "data folder") as folder:
            warn_if_open(settings.data_dir)
            # The fleet belongs to the process, the coordinator to its run.
            fleet = WorkerRegistry(settings.max_workers, settings.policy.lease_s)
            sessions = Sessions(fleet, settings.heartbeat_s, self._now)
            coordinator = self._open(fleet)
            self.coordinator = coordinator
            following = Changes()
            self.models = models = RunModels(coordinator, following.notify, self._record)
            try:
                driver = Driver(coordinator, self._rounds)
                await driver.recover()
                service = AggregatorService(coordinator, sessions, settings_text(settings))
                self.trust = trust = Trust(settings, self._identity_dir)
                trust.on_put_out(coordinator.put_out)
                trust.on_put_out(lambda name, why, drop_updates: models.device_gone(name))
                model_service = ModelService(lambda: [models], fleet, sessions, following, settings.poll_wait_s)
                async with (
                    trust.opened() as local_address,
                    serve(
                        settings.address,
                        [
                            aggregator_service(service, service.max_header_bytes),
                            models_service(model_service),
                            *trust.services,
                        ],
                        tls=trust.tls,
                        admission=trust.admission,
                        local_address=local_address,
                        grace_s=settings.drain_s,
                        options=[("grpc.max_receive_message_length", service.max_message_bytes)],
                    ) as server,
                    self._beside(trust, local_address),
                ):
                    self.port = server.port
                    await self._serve(driver, server, folder, ready)
                    coordinator.release_calls()
                    following.notify()
            finally:
                coordinator.close()
                models.close()
        return 128 + self._signals if self._signals else 0

    def _now(self) -> float:
        """Return the time of `clock`, which tests move."""
        return self.clock()

    def _record(self, what: str, about: Mapping[str, str]) -> None:
        """Record in the audit log what the aggregator did by itself."""
        assert self.trust is not None
        self.trust.audit.record(AuditEntry(self.trust.clock(), "the aggregator", "", what, about))

    def _open(self, fleet: WorkerRegistry) -> Coordinator:
        folder = self._settings.data_dir
        try:
            models = ModelStore(folder)
            journal = UploadJournal(folder / "uploads", self._settings.durable)
            store = RunStore(folder / DATABASE, self._settings.keep_rounds)
            return Coordinator(self._settings, fleet, store, models, journal, self._metrics, self._now)
        except OSError as error:
            raise UsageError(f"cannot use the data folder {folder}: {error.strerror}") from error

    async def _serve(
        self, driver: Driver, server: RunningServer, folder: HeldFolder, ready: Callable[[int], None] | None
    ) -> None:
        coordinator, health = self.coordinator, server.health
        assert coordinator is not None
        playing = asyncio.create_task(driver.run())
        watching = asyncio.create_task(_tell_health(coordinator, playing, health))
        stopping = asyncio.create_task(self._stopping.wait())
        guarding = asyncio.create_task(folder.until_removed())
        assert self.models is not None
        releasing = asyncio.create_task(self.models.keep_time())
        ends = [playing, stopping, guarding]
        try:
            await health.set_all(True)
            log.info("serving", run=self._settings.run_name, address=server.address, port=self.port)
            if ready is not None:
                ready(self.port)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if guarding.done():
                guarding.result()
            if playing.done():
                playing.result()
                await self._let_workers_know(stopping)
            await health.set(AGGREGATOR, False)
        finally:
            for task in (*ends, watching, releasing):
                task.cancel()
            await asyncio.gather(*ends, watching, releasing, return_exceptions=True)

    async def _let_workers_know(self, stopping: asyncio.Task[bool]) -> None:
        """Wait until workers that are alive have polled and know of the end. Operators may still look."""
        coordinator = self.coordinator
        assert coordinator is not None
        log.info("run ended", run=self._settings.run_name, reason=coordinator.machine.ending.text)
        timeout_s = None if self._settings.stay else self._settings.drain_s
        leaving = asyncio.create_task(coordinator.everyone_told())
        waits = [stopping] if self._settings.stay else [stopping, leaving]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()

    def stop(self, signal_number: int = 0) -> None:
        """Drain and end; a second call ends at once."""
        if self._stopping.is_set():
            log.warning("ending at once")
            os._exit(128 + signal_number)
        self._signals = signal_number
        log.info("draining", run=self._settings.run_name, within_s=self._settings.drain_s, again="ends at once")
        self._stopping.set()


async def run_aggregator(
    settings: AggregatorSettings,
    *,
    ready: Callable[[int], None] | None = None,
    metrics: Metrics | None = None,
    beside: Beside = lambda trust, address: nullcontext(),
) -> int:
    """Run an aggregator to its end; the exit code. In the main thread, SIGTERM and SIGINT drain it.

    Raises: as `Aggregator.run`.
    """
    aggregator = Aggregator(settings, metrics, beside=beside)
    with on_end_signal(aggregator.stop):
        return await aggregator.run(ready)


async def _tell_health(coordinator: Coordinator, playing: asyncio.Task[None], health: Health) -> None:
    """Report SERVING only while the round loop is alive and can commit."""
    seen, told = -1, True
    while True:
        healthy = coordinator.data_folder.healthy and not (playing.done() and not coordinator.machine.ended)
        if healthy != told:
            await health.set(AGGREGATOR, healthy)
            told = healthy
        try:
            async with asyncio.timeout(_HEALTH_INTERVAL_S):
                seen = await coordinator.changes.wait(seen)
        except TimeoutError:
            continue


def _raise_file_limit() -> None:
    """Allow as many files as may be: each connection and each upload is one, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""A whole aggregator: its data folder, its server, its driver, and how it ends."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Rounds
from fedgrpc.aggregator.host_service import HostService
from fedgrpc.aggregator.ingest import ingest_of
from fedgrpc.aggregator.model_service import ModelService
from fedgrpc.aggregator.own_rounds import OwnRounds
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.run_directory import ReadSettings, ReadTexts, RunDirectory
from fedgrpc.aggregator.run_models import RunModels
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.trust import Trust
from fedgrpc.identity.audit import AuditEntry
from fedgrpc.identity.folder import IDENTITY as IDENTITY_FOLDER
from fedgrpc.identity.folder import warn_if_open
from fedgrpc.metrics import ProcessMetrics
from fedgrpc.process import on_end_signal, reuse_memory
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.rpc.ingest import IngestProcesses
from fedgrpc.rpc.server import (
    AGGREGATOR,
    Health,
    RunningServer,
    aggregator_service,
    models_service,
    serve,
)
from fedgrpc.storage.folder import HeldFolder, hold_folder

log = structlog.get_logger()

_HEALTH_INTERVAL_S = 1.0
_AROUND_BYTES = 64 << 10
# What runs beside the server while it serves; it gets the address of the operators' socket.
Beside = Callable[[Trust, str], AbstractAsyncContextManager[object]]


@dataclass(frozen=True)
class Hosting:
    """Means of an aggregator to take further runs. `has_own`: it has one of its own settings, too."""

    has_own: bool
    read_settings: ReadSettings
    read_texts: ReadTexts


class Aggregator:
    """One aggregator. `run` it once; `stop` may be called from its event loop meanwhile."""

    def __init__(
        self,
        settings: AggregatorSettings,
        metrics: ProcessMetrics | None = None,
        rounds: Rounds = OwnRounds,
        identity_dir: Path | None = None,
        beside: Beside = lambda trust, address: nullcontext(),
        hosting: Hosting | None = None,
    ) -> None:
        """`identity_dir` is the folder of members and keys; None: one in the data folder.

        `hosting` is for an aggregator that takes further runs; None: it has the one of its settings.
        """
        self._hosting = hosting
        self._beside = beside
        self._settings = settings
        self._identity_dir = identity_dir or settings.data_dir / IDENTITY_FOLDER
        self._rounds = rounds
        self._metrics = metrics or ProcessMetrics()
        self._stopping = asyncio.Event()
        self._signals = 0
        self.clock: Callable[[], float] = time.monotonic
        self.runs: RunDirectory | None = None
        self.trust: Trust | None = None
        self.port = 0
        self.ingest: IngestProcesses | None = None

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
            # The fleet belongs to the process, a coordinator to its run.
            fleet = WorkerRegistry(settings.max_workers, settings.policy.lease_s)
            sessions = Sessions(fleet, settings.heartbeat_s, self._now)
            self.runs = runs = RunDirectory(
                *(settings, fleet, sessions, self._now, self._record, self._metrics),
                own_rounds=self._rounds,
                has_own=self._hosting is None or self._hosting.has_own,
                read_settings=None if self._hosting is None else self._hosting.read_settings,
                read_texts=None if self._hosting is None else self._hosting.read_texts,
            )
            try:
                await runs.open()
                self.trust = trust = Trust(settings, self._identity_dir)
                trust.on_put_out(runs.put_out)
                service = HostService(runs, settings, trust.identities.has_revoked, trust.check_keys)
                models = ModelService(
                    lambda: [run.models for run in runs],
                    *(fleet, sessions, self._now, runs.changes, settings.poll_wait_s),
                )
                async with (
                    trust.opened() as local_address,
                    serve(
                        settings.address,
                        [
                            aggregator_service(service, service.max_header_bytes),
                            models_service(models),
                            *trust.services,
                        ],
                        tls=trust.tls,
                        admission=trust.admission,
                        local_address=local_address,
                        grace_s=settings.drain_s,
                        ingest=ingest_of(settings),
                        options=[("grpc.max_receive_message_length", self._max_message_bytes(service))],
                    ) as server,
                    self._beside(trust, local_address),
                ):
                    self.port, self.ingest, service.ingest = server.port, server.ingest, server.ingest
                    self._metrics.show_ingest(server.ingest)
                    await self._serve(server, folder, ready)
                    runs.release_calls()
            finally:
                await runs.close()
        return 128 + self._signals if self._signals else 0

    def _max_message_bytes(self, service: HostService) -> int:
        """Size of the largest message that any call needs: gRPC collects each before anyone sees it."""
        assert self.runs is not None
        if self.runs.own is not None and self._hosting is None:
            return self.runs.own.service.max_message_bytes
        # Runs that are submitted later may have larger models.
        return max(self._settings.max_chunk_bytes, MAX_MESSAGE_BYTES, service.max_header_bytes()) + _AROUND_BYTES

    @property
    def coordinator(self) -> Coordinator | None:
        """Coordinator of the run that the process was started with; None without one, or before it is open."""
        return None if self.runs is None or self.runs.own is None else self.runs.own.coordinator

    @property
    def models(self) -> RunModels | None:
        """Models of that run."""
        return None if self.runs is None or self.runs.own is None else self.runs.own.models

    def _now(self) -> float:
        """Return the time of `clock`, which tests move."""
        return self.clock()

    def _record(self, what: str, about: Mapping[str, str]) -> None:
        """Record in the audit log what the aggregator did by itself."""
        assert self.trust is not None
        self.trust.audit.record(AuditEntry(self.trust.clock(), "the aggregator", "", what, about))

    async def _serve(self, server: RunningServer, folder: HeldFolder, ready: Callable[[int], None] | None) -> None:
        runs, health = self.runs, server.health
        assert runs is not None
        runs.start()
        over = asyncio.create_task(_until_over(runs))
        watching = asyncio.create_task(_tell_health(runs, health))
        stopping = asyncio.create_task(self._stopping.wait())
        guarding = asyncio.create_task(folder.until_removed())
        ends = [over, stopping, guarding]
        try:
            await health.set_all(True)
            log.info("serving", runs=[run.name for run in runs], address=server.address, port=self.port)
            if ready is not None:
                ready(self.port)
            if not len(runs):
                log.info("waiting for runs", hint="`fedgrpc run submit` starts one")
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if guarding.done():
                guarding.result()
            if over.done():
                over.result()
                await self._let_workers_know(stopping)
            await health.set(AGGREGATOR, False)
        finally:
            for task in (*ends, watching):
                task.cancel()
            await asyncio.gather(*ends, watching, return_exceptions=True)

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


async def run_aggregator(aggregator: Aggregator, *, ready: Callable[[int], None] | None = None) -> int:
    """Run an aggregator to its end; the exit code. In the main thread, SIGTERM and SIGINT drain it.

    Raises: as `Aggregator.run`.
    """
    with on_end_signal(aggregator.stop):
        return await aggregator.run(ready)


async def _until_over(runs: RunDirectory) -> None:
    """Return once every run has ended, if one of them is the process's own. Raises what ended a driver."""
    seen = -1
    while True:
        for run in runs:
            if run.playing is not None and run.playing.done() and not run.playing.cancelled():
                run.playing.result()
        if runs.ended and all(run.playing is None or run.playing.done() for run in runs):
            return
        seen = await runs.changes.wait(seen)


async def _tell_health(runs: RunDirectory, health: Health) -> None:
    """Report SERVING only while every run can store its rounds."""
    told = True
    while True:
        healthy = all(run.coordinator.data_folder.healthy and run.plays for run in runs)
        if healthy != told:
            await health.set(AGGREGATOR, healthy)
            told = healthy
        await asyncio.sleep(_HEALTH_INTERVAL_S)


def _raise_file_limit() -> None:
    """Allow as many files as may be: each connection and each upload is one, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""One run of a process that hosts many: its folder, its coordinator, its driver, and the calls about it.

The rule: what is found in the folder is the run. To close it and open it again is what a restart of the process
does. So settings of a run change in that way: between two rounds, and only those that a restart may change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import structlog

from fedgrpc.aggregator.changed_settings import settings_text
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Driver, Rounds
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.registering import Registering
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.run_fleet import FleetSharing, RunFleet
from fedgrpc.aggregator.run_models import Record, RunModels
from fedgrpc.aggregator.service import AggregatorService
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import LinkError, UsageError
from fedgrpc.metrics import Metrics
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1.aggregator_pb2 import RunTerms

log = structlog.get_logger()


@dataclass(frozen=True)
class Common:
    """Parts of the process that all its runs share."""

    fleet: WorkerRegistry
    sessions: Sessions
    sharing: FleetSharing
    clock: Callable[[], float]
    record: Record
    news: Callable[[], None]


class HostedRun:
    """One run from its opening to its end. Lives on one event loop."""

    def __init__(
        self, settings: AggregatorSettings, common: Common, metrics: Metrics, rounds: Rounds, is_own: bool
    ) -> None:
        """Open the folder of the run. `is_own`: it is the one that the process was started with.

        Raises `UsageError` for a folder that cannot be used, and `StorageError` for one that is corrupt.
        """
        folder = settings.data_dir
        self.settings = settings
        self.is_own = is_own
        self._common = common
        try:
            models = ModelStore(folder)
            journal = UploadJournal(folder / "uploads", settings.durable)
            store = RunStore(folder / DATABASE, settings.keep_rounds)
            self.coordinator = Coordinator(settings, common.fleet, store, models, journal, metrics, common.clock)
        except OSError as error:
            raise UsageError(f"cannot use the data folder {folder}: {error.strerror}") from error
        self.fleet = RunFleet(common.fleet, self.coordinator, common.sharing, is_own)
        self.coordinator.candidates = self.fleet
        self.models = RunModels(self.coordinator, common.news, common.record)
        self._driver = Driver(self.coordinator, rounds)
        self._service: AggregatorService | None = None
        self._calls: set[asyncio.Task[object]] = set()
        self._closing = False
        self.playing: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.settings.run_name

    @property
    def id(self) -> str:
        """Id of the run, which no other run has."""
        return self.coordinator.machine.id

    @property
    def service(self) -> AggregatorService:
        """Calls about this run; after `recover`."""
        assert self._service is not None
        return self._service

    @property
    def plays(self) -> bool:
        """True unless the driver has ended before the run."""
        over = self.playing is not None and self.playing.done()
        return not over or self.coordinator.machine.ended

    async def recover(self, registering: Registering | None) -> None:
        """Take up what a former process left; `registering` is the process's. Raises as `Driver.recover`."""
        await self._driver.recover()
        text = settings_text(self.settings)
        self._service = AggregatorService(self.coordinator, self._common.sessions, text, registering)

    def start(self) -> None:
        """Play rounds from now on."""
        self.playing = asyncio.create_task(self._driver.run())
        self._keeping = asyncio.create_task(self.models.keep_time())
        self.playing.add_done_callback(lambda _: self._common.news())

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Count the call that runs the block. Raises `LinkError` while the run is closed."""
        if self._closing:
            raise LinkError(f"the settings of run {self.name} change; try again")
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    @asynccontextmanager
    async def between_rounds(self) -> AsyncIterator[None]:
        """Let the round in progress end, and open no other while the block runs.

        Closing the run there interrupts no task of its own. Raises `LinkError` where the process ends before.
        """
        with self._driver.held():
            machine, seen = self.coordinator.machine, -1
            while not (machine.ended or self._is_between_rounds):
                if self.coordinator.stopping:
                    raise LinkError(f"run {self.name} is closed before its round has ended; try again")
                seen = await self.coordinator.changes.wait(seen)
            yield

    @property
    def _is_between_rounds(self) -> bool:
        machine = self.coordinator.machine
        state = None if machine.round is None else machine.round.state
        return state is None or (state.phase is RoundPhase.SELECTING and not state.asked)

    async def close(self) -> None:
        """End the driver and all calls, and let the files go. What was on the way is as after a restart."""
        self._closing = True
        self.coordinator.release_calls()
        own = asyncio.current_task()
        tasks = [task for task in (self.playing, self._keeping, *self._calls) if task not in (None, own)]
        for task in tasks:
            assert task is not None
            task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        self.coordinator.close()
        self.models.close()

    def terms(self) -> RunTerms:
        """Return what a device needs to get ready for tasks of this run."""
        return RunTerms(
            run=self.name,
            run_id=self.id,
            learning_task=self.settings.learning_task,
            model=self.settings.model,
            options=dict(self.settings.task_options),
            tell_channels=self.service.calls.asks_channels,
            without_metrics=not self.settings.privacy.metrics,
        )

"""The production aggregator of one run on a virtual clock, called directly: there is no network.

The rule: everything that decides, encodes, checks, averages and records is the aggregator's own. What is left out
is what a network needs: connections, authentication, slots for uploads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

from fedgrpc.aggregator.acceptance import Acceptance
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Driver, Upkeep
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.negotiation import reduction_for
from fedgrpc.aggregator.new_version import AcceptedUpdates
from fedgrpc.aggregator.own_rounds import OwnRounds
from fedgrpc.aggregator.payload_encoder import EncodedModel, Pull
from fedgrpc.aggregator.receiver import Receiver
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.update_checks import ExpectedUpdate
from fedgrpc.aggregator.worker_calls import Beat, WorkerCalls
from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.metrics import Metrics
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.rounds.events import Progress, TaskPhase
from fedgrpc.rounds.history import Histories, Punctuality
from fedgrpc.rounds.version import Version
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.events import Evaluated, RunPhase
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import Report
from fedgrpc.simulation.learning.uploads import MemoryJournal, UploadInMemory
from fedgrpc.storage.database import DATABASE, database_errors
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.task_rows import RunRow, TaskRow
from fedgrpc.storage.uploads import Upload
from fedgrpc.v1 import round_pb2
from fedgrpc.v1.aggregator_pb2 import RegisterRequest, Task, UpdateHeader

# What a device holds: a version, and the SHA-256 of the payload that gave it to the device.
Held = tuple[int, bytes]
OnRoundEnd = Callable[[RoundInProgress], Awaitable[None]]


class _Store(RunStore):
    """The run's database, which takes what happens all at once by `keep`: when the end of a round is noted.

    So a round that was cut off is played again from where it began. Histories change at its end alone.
    """

    # A round has ended here whose end is not noted.
    _unnoted = False

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with database_errors(self.path):
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("SAVEPOINT part")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK TO part")
                raise
            finally:
                self._db.execute("RELEASE part")

    def _checkpoint(self) -> None:
        """Leave it to `keep`."""

    def keep(self) -> None:
        """Make durable all that has happened. Raises `StorageError`."""
        with database_errors(self.path):
            self._db.commit()
        self._unnoted = False
        super()._checkpoint()

    def close(self) -> None:
        """See `Database.close`. What happened since the end of a round that is not noted is forgotten."""
        if not self._unnoted:
            self.keep()
        super().close()

    def save_run(self, run: RunRow) -> None:
        """See `RunStore.save_run`. At once: a folder with models needs a database that knows of the run."""
        super().save_run(run)
        if not self._unnoted:
            self.keep()

    def finish_round(
        self, record: round_pb2.Round, tasks: Iterable[TaskRow], histories: Histories, version: Version | None
    ) -> None:
        """See `RunStore.finish_round`."""
        super().finish_round(record, tasks, histories, version)
        self._unnoted = True

    def save_open_round(
        self,
        record: round_pb2.Round,
        aim: int,
        deadline_at: float,
        tasks: Iterable[TaskRow],
        selected: Histories,
        last_steps: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """See `RunStore.save_open_round`."""
        super().save_open_round(record, aim, deadline_at, tasks, {}, last_steps)


class _WatchedRounds(OwnRounds):
    """The run's own rounds; a commit takes `commit_s` virtual seconds, and the end of each round is told.

    `abandoned` rounds in a row were the last ones before a resumed simulation was cut off.
    """

    def __init__(
        self,
        on_end: OnRoundEnd,
        commit_s: float,
        abandoned: int,
        coordinator: Coordinator,
        upkeep: Upkeep,
        updates: AcceptedUpdates,
    ) -> None:
        super().__init__(coordinator, upkeep, updates)
        self._on_end = on_end
        self._commit_s = commit_s
        self.abandoned = abandoned

    async def recover(self, recovery: Recovery) -> None:
        """See `RoundSource.recover`. Clears away what a process that was cut off has not."""
        await super().recover(recovery)
        self._upkeep.over(())
        await self._upkeep.clear_away()

    async def next_round(self) -> RoundInProgress | None:
        """See `RoundSource.next_round`. There is no operator who would resume a run that has paused itself."""
        run = self._coordinator.machine
        if run.phase is RunPhase.PAUSED:
            raise FedgrpcError(f"the run has paused itself: {run.paused_reason}")
        return await super().next_round()

    async def write(self, round_: RoundInProgress, merge: Merge) -> tuple[Version | None, Layout]:
        """See `RoundSource.write`."""
        await asyncio.sleep(self._commit_s)
        return await super().write(round_, merge)

    async def ended(self, round_: RoundInProgress) -> None:
        """See `RoundSource.ended`."""
        await super().ended(round_)
        await self._on_end(round_)
        # Now and not at some wait: what a resumed simulation finds on the disk decides what devices are sent.
        await self._upkeep.clear_away()


class SimulatedUpload:
    """One update on its way in: `append` bytes as the link brings them, then `accept`."""

    def __init__(
        self,
        coordinator: Coordinator,
        acceptance: Acceptance,
        upload: Upload | UploadInMemory,
        report: Report,
        expected: ExpectedUpdate,
    ) -> None:
        self._coordinator = coordinator
        self._acceptance = acceptance
        self._upload = upload
        self._report = report
        self._expected = expected
        self._begun_at = coordinator.clock()

    def append(self, data: bytes) -> None:
        """Commit the next bytes. Raises `RoundClosed`, `UnknownTask` and `StorageError`."""
        upload = self._upload
        if isinstance(upload, UploadInMemory):
            upload.append(data)
        else:
            upload.append([Chunk(upload.size_bytes, data, crc32(data))])
        held, total = upload.size_bytes, upload.manifest.size_bytes
        self._coordinator.apply(Progress(upload.header.token, TaskPhase.UPLOADING, held / total, held, total))

    async def accept(self) -> None:
        """Verify and count the update. Raises `UpdateRefused`, `RoundClosed` and `StorageError`."""
        took_s = self._coordinator.clock() - self._begun_at
        upload, report = self._upload, self._report.uploaded_in(took_s)
        await self._acceptance.accept(upload.header.token, upload.manifest, report, self._expected, lambda: upload)

    def discard(self) -> None:
        """Leave nothing of it."""
        if not self._upload.closed:
            self._upload.discard()


class SimulatedAggregator:
    """One run in a data folder. Lives on one event loop: `restart`, then `play`, then `close`."""

    def __init__(
        self,
        settings: AggregatorSettings,
        clock: Callable[[], float],
        on_round_end: OnRoundEnd,
        commit_s: float = 0.0,
        abandoned: int = 0,
    ) -> None:
        """Open the data folder, in which so many rounds in a row were `abandoned`.

        Raises `UsageError` where it cannot be used.
        """
        folder = settings.data_dir
        fleet = WorkerRegistry(settings.max_workers, settings.policy.lease_s)
        try:
            models, journal = ModelStore(folder), MemoryJournal(folder / "uploads")
            store = _Store(folder / DATABASE, settings.keep_rounds)
            self.coordinator = Coordinator(settings, fleet, store, models, journal, Metrics(), clock)
            self.keep = store.keep
        except OSError as error:
            raise UsageError(f"cannot use the folder {folder}: {error.strerror}") from error
        self._journal = journal
        self._receiver = Receiver(
            self.coordinator,
            journal,
            settings,
            self.coordinator.scores,
            self.coordinator.data_folder,
            self.coordinator.expected_update,
        )
        self._terms = self.coordinator.terms
        self._calls = WorkerCalls(self.coordinator, Sessions(fleet, settings.heartbeat_s, clock))
        self._on_round_end = on_round_end
        self._driver = Driver(self.coordinator, partial(_WatchedRounds, self._round_ended, commit_s, abandoned))
        self.play = self._driver.run
        self.close = self.coordinator.close

    async def restart(self) -> None:
        """Take up what a former process left, but for the round that was cut off: it is played again.

        Raises `UsageError` and `StorageError` as a restart of an aggregator does.
        """
        await self.coordinator.in_database(self.coordinator.store.forget_open_round)
        await self._driver.recover()

    async def _round_ended(self, round_: RoundInProgress) -> None:
        self._journal.write(round_.state.carried)
        await self._on_round_end(round_)

    @property
    def run(self) -> RunMachine:
        """The run itself, to look at."""
        return self.coordinator.machine

    @property
    def wants_channels(self) -> bool:
        """True if a worker that registers is to send the channels of the model."""
        return self._calls.asks_channels

    def register(self, registration: RegisterRequest) -> None:
        """Add a worker. Raises `UsageError` as a registration over the network does."""
        coordinator = self.coordinator
        registration = bounded_registration(registration)
        coordinator.settings.roles.check(registration)
        coordinator.negotiation.check(registration)
        if coordinator.fleet.find(registration.worker) is None:
            # Its history is kept with it.
            coordinator.store.save_worker(registration)
        coordinator.fleet.register(registration, coordinator.clock())

    async def describe(self, name: str, description: ModelDescription) -> None:
        """See `WorkerCalls.describe`."""
        await self._calls.describe(name, description)

    async def poll(self, name: str, held: Held | None) -> Task | None:
        """Wait for a task; None once the run has ended."""
        token = await self._calls.poll(name, self.coordinator.settings.poll_wait_s, held)
        return None if token is None else self._terms.message(name, token)

    async def pull(self, task: Task, name: str, held: Held | None) -> EncodedModel:
        """Return the payload that a worker pulls. Raises as the call of that name does."""
        version, context = self._terms.given(name, task.token)
        assert context.agreed is not None
        worker = self.coordinator.fleet.get(name)
        reduction = reduction_for(worker, context.local.plan)
        return await self.coordinator.encoded_models.get(
            Pull(version, context.agreed.downlink, held, context.local.sub_model, reduction)
        )

    async def heartbeat(self, name: str, token: str, phase: TaskPhase, fraction: float) -> Beat:
        """See `WorkerCalls.heartbeat`."""
        return await self._calls.heartbeat(name, token, phase, fraction)

    async def give_back(self, name: str, token: str, reason: str) -> None:
        """See `WorkerCalls.give_back`."""
        await self._calls.give_back(name, token, reason)

    def scored(self, name: str, version: int) -> None:
        """Note that an evaluator has scored a version before the simulation was cut off."""
        self.coordinator.apply(Evaluated(Evaluation("", name, version), None))

    def fleet_state(self) -> dict[str, list[float]]:
        """Return when each worker was last heard, and its punctuality, as JSON has it."""
        return {
            worker.name: [worker.last_seen, worker.trust.held_up, worker.trust.doubted_until]
            for worker in self.coordinator.fleet
        }

    def restore_fleet(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take workers to where `fleet_state` had them. Raises `UnknownWorker`, ValueError and TypeError."""
        for name, (last_seen, held_up, doubted_until) in state.items():
            self.coordinator.fleet.recall(name, last_seen, Punctuality(int(held_up), doubted_until))

    async def score(self, header: UpdateHeader) -> None:
        """Take the scores of an evaluator."""
        await self._receiver.receive(header, _nothing())

    async def begin_upload(self, header: UpdateHeader) -> SimulatedUpload:
        """Check the header of an update, and make room for its bytes.

        Raises `LayoutError`, `TooLargeError` and `UpdateRefused` for good, `RoundClosed` and `UnknownTask` for one
        that is too late.
        """
        await self.coordinator.check_open(header.worker, header.token)
        acceptance = self._receiver.acceptance
        manifest, report, expected = acceptance.examined(header)
        upload = self._journal.begun(header, manifest)
        return SimulatedUpload(self.coordinator, acceptance, upload, report, expected)


async def _nothing() -> AsyncIterator[Chunk]:
    return
    yield Chunk(0, b"", 0)

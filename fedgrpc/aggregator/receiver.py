"""Receiving updates: one stream of an upload at a time stores its bytes, and `Acceptance` has the whole update.

The rule: a stream that ends early leaves what has come, and the next one continues from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.acceptance import Acceptance
from fedgrpc.aggregator.arrival import Arrival
from fedgrpc.aggregator.ingest_uploads import Stored, UploadOrder
from fedgrpc.aggregator.round_records import VersionScores
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.update_checks import ExpectedUpdate, max_header_bytes
from fedgrpc.aggregator.upload_queue import UploadSlots, UploadStream
from fedgrpc.aggregator.upload_reader import ByteBudget, UploadChunks, UploadReader
from fedgrpc.aggregator.uploads_in_progress import UploadsInProgress, may_have_sides
from fedgrpc.aio import to_its_end
from fedgrpc.codec.chunk import FIRST_CHUNK_BYTES, Chunk
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import Exhausted, LayoutError, RoundClosed, StorageError
from fedgrpc.protocol.records import metrics_from_proto
from fedgrpc.rounds.events import Progress, TaskPhase
from fedgrpc.rpc.relayed_calls import RelayedCall
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.task_context import Report
from fedgrpc.storage.data_folder import DataFolder, Use
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

# How often the round hears how far an upload is. Each chunk would cost an event.
_PROGRESS_INTERVAL_S = 0.1

log = structlog.get_logger()


@dataclass(frozen=True)
class Held:
    """State of an upload: bytes held, whether it is accepted, and the wait before the rest is sent."""

    size_bytes: int
    complete: bool
    retry_after_s: float = 0.0


class Receiver:
    """Takes the updates of one run into the files of `journal`."""

    def __init__(
        self,
        shell: RunShell,
        journal: UploadJournal,
        settings: AggregatorSettings,
        scores: VersionScores,
        data_folder: DataFolder,
        expected: Callable[[str, str], ExpectedUpdate],
    ) -> None:
        """`expected(worker, token)` says what an open task asks of its update."""
        self._shell = shell
        self._run = shell.machine
        self._settings = settings
        self._journal = journal
        self._scores = scores
        self._data_folder = data_folder
        self.acceptance = Acceptance(shell, journal, settings.run_name, expected)
        self._slots = UploadSlots(settings.max_uploads)
        self._memory = ByteBudget(settings.max_upload_memory_bytes)
        self._header_of: Layout = ()
        self._max_header_bytes = max_header_bytes(())
        # When the first byte of each update came.
        self._begun: dict[str, float] = {}
        self._in_progress = UploadsInProgress(settings.max_upload_memory_bytes)
        self._log = log.bind(run=settings.run_name)
        shell.on_task_closed(self._close_task)

    def _close_task(self, token: str, reason: str) -> None:
        self._begun.pop(token, None)
        self._slots.close(token, reason)

    def max_header_bytes(self) -> int:
        """Size of the largest header that an update of this run can need."""
        layout = self._run.layout
        if layout != self._header_of:
            self._header_of, self._max_header_bytes = layout, max_header_bytes(layout)
        return self._max_header_bytes

    async def receive(
        self, header: UpdateHeader, chunks: AsyncIterator[Chunk], whole: Chunk | None = None
    ) -> tuple[int, bool]:
        """Take an update; (committed bytes, whether it is complete and accepted).

        `whole`: all of a small one, which came with its header.

        Raises as `PushUpdate` in aggregator.proto says.
        """
        worker, token = header.worker, header.token
        if evaluation := self._run.evaluations.find(worker, token):
            await self._score(evaluation, header)
            return 0, True
        # The former stream first: it may have closed the task, or have completed the update.
        await self._slots.end_former(token, worker)
        if await self._shell.check_open(worker, token) is TaskPhase.ACCEPTED:
            return header.manifest.size_bytes, True
        # From here to the slot nothing is awaited, so that the task stays open and has no other stream.
        manifest, report, expected = self.acceptance.examined(header)
        most_bytes = min(FIRST_CHUNK_BYTES, self._settings.max_chunk_bytes)
        if whole is not None and not 0 < len(whole.data) == manifest.size_bytes <= most_bytes:
            raise LayoutError("with its header comes all of a small update, or nothing of it")
        async with self._slots.slot(token, worker) as stream:
            arrival, is_new = Arrival(self._journal, header, manifest), token not in self._begun
            self._begun.setdefault(token, time.monotonic())
            try:
                if whole is None and isinstance(chunks, UploadChunks) and chunks.relayed is not None:
                    return await self._store_there(arrival, report, expected, chunks.relayed, stream)
                if whole is None and (not is_new or may_have_sides(manifest.size_bytes)):
                    # How much is there already tells how fast it comes, and which stream has the next chunk.
                    await self._open(arrival)
                return await self._store(arrival, report, expected, chunks, whole, stream)
            except StorageError as error:
                self._data_folder.failed(Use.UPDATES, error)
                raise

    async def _open(self, arrival: Arrival) -> None:
        """Open the file of an upload. Cancelled, it leaves none open, and none that no round wants."""
        try:
            # To its end: the next stream of this upload opens the same file once this one has left its slot.
            await to_its_end(asyncio.to_thread(arrival.opened))
        except asyncio.CancelledError:
            await asyncio.to_thread(arrival.close, not self._run.takes_update(arrival.header.token))
            raise

    async def receive_beside(self, worker: str, token: str, chunks: UploadChunks) -> None:
        """Take the chunks of a side stream. Raises as `PushUpdate` in aggregator.proto says."""
        await self._shell.check_open(worker, token)
        if chunks.relayed is not None:
            # Its upload may be at another ingest process, and one process at a time writes to a file.
            raise Exhausted("an upload through ingest processes has one stream; go on with that")
        await self._in_progress.take_beside(token, chunks)

    async def held(self, worker: str, token: str) -> Held:
        """Return how much is held of an update. Raises as `QueryPush` says."""
        if self._run.evaluations.find(worker, token):
            return Held(0, not self._run.evaluations.waiting_for(worker, self._run.version))
        if await self._shell.check_open(worker, token) is TaskPhase.ACCEPTED:
            return Held(await self._accepted_bytes(token), True)
        retry_after_s = self._slots.wait_s(token)
        size_bytes = await asyncio.to_thread(self._journal.committed_bytes, token)
        return Held(size_bytes, False, retry_after_s)

    async def _accepted_bytes(self, token: str) -> int:
        """Payload bytes of an update that was accepted; 0 where the record of its round has gone."""
        round_ = self._run.round
        in_database, store = self._shell.in_database, self._shell.store
        if round_ is not None and (report := round_.context(token).report) is not None:
            return report.upload_bytes
        row = await in_database(store.task, token)
        record = None if row is None else await in_database(store.round, row.round)
        tasks = () if row is None or record is None else record.tasks
        return next((task.upload_bytes for task in tasks if row is not None and task.worker == row.worker), 0)

    async def _score(self, evaluation: Evaluation, header: UpdateHeader) -> None:
        """Take an evaluator's scores, which come in a header alone."""
        scores = metrics_from_proto(header.evaluation_metrics)
        if not_finite := metrics_from_proto(dict.fromkeys(header.scores_not_finite, 0.0)):
            self._log.warning("scores not finite", worker=header.worker, names=sorted(not_finite))
        example_count = claims.EXAMPLES.checked(header.evaluation_example_count)
        await self._scores.by_evaluator(evaluation, scores, example_count)

    async def _store(
        self,
        arrival: Arrival,
        report: Report,
        expected: ExpectedUpdate,
        chunks: AsyncIterator[Chunk],
        whole: Chunk | None,
        stream: UploadStream,
    ) -> tuple[int, bool]:
        """Commit chunks until the stream ends, and accept the update once it is whole.

        The last chunk is committed by the thread that checks and seals the update.
        """
        token, size_bytes = arrival.header.token, arrival.manifest.size_bytes
        reader = UploadReader(arrival, self._memory, self._settings.max_chunk_bytes)

        async def still_wanted() -> None:
            if time.monotonic() - stream.told_at >= _PROGRESS_INTERVAL_S:
                self._tell(arrival, stream)

        discard = False
        try:
            stream.carries(arrival)
            await still_wanted()
            last = whole
            if whole is None:
                with self._in_progress.reading(token, size_bytes, reader):
                    last = await reader.run(chunks, self._settings.policy.lease_s, still_wanted)
            if last is None and size_bytes and not (await to_its_end(asyncio.to_thread(arrival.opened))).complete:
                return arrival.size_bytes, False
            stream.complete()
            took_s = time.monotonic() - self._begun.get(token, time.monotonic())
            if whole is not None:
                # How long one message took is not seen here: the worker tells of its last one.
                took_s = max(took_s, report.timings.upload_s)
            # An update that is here whole outlives its connection.
            await to_its_end(self._accept(arrival, last, report.uploaded_in(took_s), expected))
            self._data_folder.works(Use.UPDATES)
        except (RoundClosed, asyncio.CancelledError) as error:
            # The round has swept up what there was of its uploads, perhaps before this one was there.
            discard = isinstance(error, RoundClosed) or stream.closed_for is not None
            raise
        finally:
            reader.release()
            if arrival.upload is not None and (discard or not arrival.upload.closed):
                await asyncio.to_thread(arrival.close, discard)
        return size_bytes, True

    async def _store_there(
        self,
        arrival: Arrival,
        report: Report,
        expected: ExpectedUpdate,
        call: RelayedCall,
        stream: UploadStream,
    ) -> tuple[int, bool]:
        """Have the ingest process of the call commit the chunks, and accept the update once it is whole."""
        header, size_bytes = arrival.header, arrival.manifest.size_bytes
        stream.carries(arrival)
        self._tell(arrival, stream)

        def hear(told_bytes: int) -> None:
            arrival.told_bytes = told_bytes
            if told_bytes == size_bytes:
                stream.complete()
            elif stream.closed_for is None:
                self._tell(arrival, stream)

        try:
            with self.acceptance.sealing(header.token):
                came = Stored(await call.do(self._order(header, expected), hear))
            if came is Stored.PART:
                return arrival.size_bytes, False
            took_s = time.monotonic() - self._begun.get(header.token, time.monotonic())
            uploaded = report.uploaded_in(took_s)
            if came is Stored.SEALED:
                await self.acceptance.count(header.token, uploaded, expected)
                self._begun.pop(header.token, None)
            else:
                await to_its_end(self._accept(arrival, None, uploaded, expected))
            self._data_folder.works(Use.UPDATES)
        except (RoundClosed, asyncio.CancelledError) as error:
            if isinstance(error, RoundClosed) or stream.closed_for is not None:
                await asyncio.to_thread(self._journal.discard, [header.token])
            raise
        finally:
            if arrival.upload is not None:
                await asyncio.to_thread(arrival.close, False)
        return size_bytes, True

    def _order(self, header: UpdateHeader, expected: ExpectedUpdate) -> bytes:
        settings, plain = self._settings, expected.takes_plain(header)
        return UploadOrder(
            folder=self._journal.folder,
            durable=settings.durable,
            idle_s=settings.policy.lease_s,
            max_chunk_bytes=settings.max_chunk_bytes,
            admission=expected.admission if plain else None,
        ).encoded(header)

    async def _accept(
        self, arrival: Arrival, last: Chunk | None, report: Report, expected: ExpectedUpdate
    ) -> None:
        """Commit the last chunk, if there is one, and accept the update. Raises as `Acceptance.accept`."""
        whole = partial(arrival.whole, last)
        token = arrival.header.token
        await self.acceptance.accept(token, arrival.manifest, report, expected, whole)
        self._begun.pop(token, None)

    def _tell(self, arrival: Arrival, stream: UploadStream) -> None:
        """Tell the round how far the upload is. Raises `RoundClosed`."""
        if stream.closed_for is not None:
            raise RoundClosed(stream.closed_for)
        stream.told_at = time.monotonic()
        held, total = arrival.size_bytes, arrival.manifest.size_bytes
        fraction = held / total if total else 1.0
        self._shell.apply(Progress(arrival.header.token, TaskPhase.UPLOADING, fraction, held, total))

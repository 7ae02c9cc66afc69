"""Receiving updates: check the header, store the bytes, verify, make durable, and only then accept.

The rule: nothing of an update counts before all of it does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.round_records import VersionScores
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.update_checks import ExpectedUpdate, decoding_bytes, examine, max_header_bytes, verify
from fedgrpc.aggregator.upload_queue import UploadSlots, UploadStream
from fedgrpc.aggregator.upload_reader import ByteBudget, UploadReader
from fedgrpc.aio import to_its_end, until_done
from fedgrpc.codec.chunk import FIRST_CHUNK_BYTES, Chunk
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import CodecError, LayoutError, RoundClosed, StorageError, TooLargeError, UpdateRefused
from fedgrpc.protocol.records import metrics_from_proto
from fedgrpc.rounds.events import Progress, TaskPhase
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.events import UpdateAccepted
from fedgrpc.runs.merge import Weighing
from fedgrpc.runs.task_context import Report
from fedgrpc.storage.data_folder import DataFolder, Use
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.storage.uploads import Upload, UploadJournal
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

# How often the round hears how far an upload is. Each chunk would cost an event.
_PROGRESS_INTERVAL_S = 0.1
# Updates that are verified at the same time, and memory all together; threads, which then wait for the disk.
_CHECKERS = 4
_SEALERS = 16
_DECODING_BYTES = 64 << 20

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
        self._expected = expected
        self._slots = UploadSlots(settings.max_uploads)
        self._memory = ByteBudget(settings.max_upload_memory_bytes)
        self._decoding = ByteBudget(_DECODING_BYTES)
        self._checkers = ThreadPoolExecutor(_SEALERS, thread_name_prefix="checking")
        self._checking = threading.BoundedSemaphore(_CHECKERS)
        self._header_of: Layout = ()
        self._max_header_bytes = max_header_bytes(())
        # When the first byte of each update came.
        self._begun: dict[str, float] = {}
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
        manifest, report, expected = self.examined(header)
        most_bytes = min(FIRST_CHUNK_BYTES, self._settings.max_chunk_bytes)
        if whole is not None and not 0 < len(whole.data) == manifest.size_bytes <= most_bytes:
            raise LayoutError("with its header comes all of a small update, or nothing of it")
        async with self._slots.slot(token, worker) as stream:
            self._begun.setdefault(token, time.monotonic())
            try:
                if whole is not None:
                    await self._store_whole(header, manifest, report, expected, whole, stream)
                    return manifest.size_bytes, True
                return await self._store(header, manifest, report, expected, chunks, stream)
            except StorageError as error:
                self._data_folder.failed(Use.UPDATES, error)
                raise

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

    def examined(self, header: UpdateHeader) -> tuple[Manifest, Report, ExpectedUpdate]:
        """Check the header of an open task's update. A refusal is for good. Raises as `examine`."""
        try:
            expected = self._expected(header.worker, header.token)
            manifest, report = examine(header, expected)
        except (LayoutError, TooLargeError, UpdateRefused) as error:
            self._shell.reject(header.token, str(error))
            raise
        return manifest, report, expected

    async def _store(
        self,
        header: UpdateHeader,
        manifest: Manifest,
        report: Report,
        expected: ExpectedUpdate,
        chunks: AsyncIterator[Chunk],
        stream: UploadStream,
    ) -> tuple[int, bool]:
        """Commit chunks until the stream ends, and accept the update once it is whole."""
        upload = await self._begin(header, manifest)
        stream.carries(upload)

        async def still_wanted() -> None:
            if time.monotonic() - stream.told_at >= _PROGRESS_INTERVAL_S:
                self._tell(upload, stream)

        try:
            await still_wanted()
            reader = UploadReader(upload, self._memory, self._settings.max_chunk_bytes)
            await reader.run(chunks, self._settings.policy.lease_s, still_wanted)
            if not upload.complete:
                return upload.size_bytes, False
            stream.complete()
            # An update that is here whole outlives its connection.
            took_s = time.monotonic() - self._begun.get(header.token, time.monotonic())
            await to_its_end(self.accept(upload, report.uploaded_in(took_s), expected))
            self._data_folder.works(Use.UPDATES)
        except (RoundClosed, asyncio.CancelledError) as error:
            # The round has swept up what there was of its uploads, perhaps before this one was there.
            if isinstance(error, RoundClosed) or stream.closed_for is not None:
                await asyncio.to_thread(upload.discard)
            raise
        finally:
            if not upload.closed:
                await asyncio.to_thread(upload.close)
        return manifest.size_bytes, True

    async def _store_whole(
        self,
        header: UpdateHeader,
        manifest: Manifest,
        report: Report,
        expected: ExpectedUpdate,
        chunk: Chunk,
        stream: UploadStream,
    ) -> None:
        """Store and accept an update that is here, in one hop to a thread."""
        size_bytes = manifest.size_bytes
        self._shell.apply(Progress(header.token, TaskPhase.UPLOADING, 1.0, size_bytes, size_bytes))
        stream.complete()

        def store() -> StoredUpdate:
            upload = self._journal.begin(header, manifest)
            try:
                upload.append([chunk])
                return self._verify_and_seal(upload, expected)
            finally:
                if not upload.closed:
                    upload.close()

        # Earlier tries were streams. How long one message took is not seen here: the worker tells of its last one.
        took_s = time.monotonic() - self._begun.get(header.token, time.monotonic())
        uploaded = report.uploaded_in(max(took_s, report.timings.upload_s))
        await to_its_end(self._accept(header, manifest, uploaded, expected, store))
        self._data_folder.works(Use.UPDATES)

    async def _begin(self, header: UpdateHeader, manifest: Manifest) -> Upload:
        """Begin or continue the upload. Cancelled, it leaves no open file, and none that no round wants."""
        beginning = asyncio.create_task(asyncio.to_thread(self._journal.begin, header, manifest))
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            await until_done(beginning)
            if beginning.exception() is None:
                upload = beginning.result()
                await asyncio.to_thread(upload.close if self._run.takes_update(header.token) else upload.discard)
            raise

    def _tell(self, upload: Upload, stream: UploadStream) -> None:
        """Tell the round how far the upload is. Raises `RoundClosed`."""
        if stream.closed_for is not None:
            raise RoundClosed(stream.closed_for)
        stream.told_at = time.monotonic()
        held, total = upload.size_bytes, upload.manifest.size_bytes
        fraction = held / total if total else 1.0
        self._shell.apply(Progress(upload.header.token, TaskPhase.UPLOADING, fraction, held, total))

    async def accept(self, upload: Upload, report: Report, expected: ExpectedUpdate) -> None:
        """Verify an update that is here whole, make it durable, count it. Raises as `_accept`."""
        seal = partial(self._verify_and_seal, upload, expected)
        await self._accept(upload.header, upload.manifest, report, expected, seal)

    async def _accept(
        self,
        header: UpdateHeader,
        manifest: Manifest,
        report: Report,
        expected: ExpectedUpdate,
        seal: Callable[[], StoredUpdate],
    ) -> None:
        """Have the whole update verified and made durable, in a thread by `seal`, and count it.

        Raises `UpdateRefused`, `RoundClosed` and `StorageError`.
        """
        token = header.token
        # Many updates that end at once wait here for memory to decode them.
        size_bytes = decoding_bytes(manifest)
        await self._decoding.take(size_bytes)
        try:
            loop = asyncio.get_running_loop()
            sealed = await loop.run_in_executor(self._checkers, seal)
        except StorageError:
            # A round that has closed meanwhile has swept its uploads away: that is no fault of the disk.
            if not self._run.takes_update(token):
                raise RoundClosed("the round of this task has ended") from None
            raise
        except UpdateRefused as error:
            self._shell.reject(token, str(error))
            raise
        finally:
            self._decoding.give_back(size_bytes)
        self._journal.remember(token, sealed)
        try:
            self._count(token, report, expected.weighing)
        except RoundClosed:
            await asyncio.to_thread(self._journal.discard, [token])
            raise
        self._begun.pop(token, None)

    def _count(self, token: str, report: Report, weighing: Weighing) -> None:
        """Count a durable update. Raises `RoundClosed` when it came too late."""
        round_ = self._run.round_of(token)
        worker = round_.worker_of(token)
        # Only a leaf's weight depends on who else is here, and to list a thousand workers takes a millisecond.
        here = round_.state.workers if report.merged_updates else ()
        weight = weighing.weight_of(round_.kind, worker, report, here)
        self._shell.apply(UpdateAccepted(token, weight, report))
        about = {"round": round_.number, "worker": worker}
        self._log.info("update accepted", **about, examples=report.example_count, bytes=report.upload_bytes)
        if report.unchanged:
            self._log.warning("training changed nothing", **about)

    def _verify_and_seal(self, upload: Upload, expected: ExpectedUpdate) -> StoredUpdate:
        """Return the accepted update. Raises `UpdateRefused` for good, `CorruptError` and `StorageError`."""
        stored = upload.finish()
        try:
            with self._checking:
                verify(stored, expected)
        except (CodecError, UpdateRefused) as error:
            upload.discard()
            # The digest matches, so these are the bytes that were sent: `CorruptError` would ask for them again.
            raise UpdateRefused(str(error)) from error
        return upload.seal()

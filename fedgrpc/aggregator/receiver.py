"""Receiving updates: stream, commit, verify, make durable, and only then accept.

The rule: nothing of an update counts before all of it does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from fedgrpc import claims
from fedgrpc.aggregation.admission import AdmissionPolicy, check_layout, check_values, check_variances
from fedgrpc.aggregation.partial_aggregate import check_partial_aggregate, partial_aggregate_values
from fedgrpc.aggregation.partial_update import unpack_all
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.first_model import complaint
from fedgrpc.aggregator.memory import ByteBudget
from fedgrpc.aggregator.scales import check_steps
from fedgrpc.aggregator.upload_queue import UploadQueue
from fedgrpc.aggregator.upload_reader import UploadReader
from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.manifest import Limits, Manifest
from fedgrpc.codec.payload import EARLY_CUT_BYTES
from fedgrpc.errors import (
    CodecError,
    Exhausted,
    LayoutError,
    LinkError,
    RoundClosed,
    StorageError,
    TooLargeError,
    UpdateRefused,
)
from fedgrpc.protocol.records import metrics_from_proto
from fedgrpc.protocol.tensors import layout_to_proto, manifest_from_proto
from fedgrpc.protocol.updates import report_from_proto
from fedgrpc.rounds.events import Progress, TaskPhase
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.task import UploadPace
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import LocalTask, Report
from fedgrpc.storage.data_folder import Use
from fedgrpc.storage.update_file import StoredUpdate, UpdateFile
from fedgrpc.storage.uploads import Upload
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

_PROGRESS_INTERVAL_S = 0.1

log = structlog.get_logger()
# A stream that is slower than this, measured over one to two such times, leaves its slot to one who waits. In
# that time a link of 5 kB/s brings the 64 KiB that an upload over an unknown link begins with.
_LEAST_BYTES_PER_S = 1024
_PACE_S = 15.0
# Where others wait, one that needs much longer than this gives its slot up in between: whoever fills all slots
# with slow streams has them for a turn, not for a round.
_TURN_S = 30.0
# Updates that are checked at the same time: threads, and memory all together.
_CHECKERS = 4
_DECODING_BYTES = 64 << 20
# Of one: frames and pieces, and as many arrays of its largest tensor.
_BESIDE_BYTES = 8 << 20
_ARRAYS = 4
# What a header has beside its manifest; what an entry has beside its name and shape; entries for a tensor, and as
# much again for its channels; bytes of one frame's sizes; element, float64 weight and rest of a mean.
_OTHER_BYTES = 64 << 10
_ENTRY_BYTES = 128
_LISTED = 4
_FRAME_BYTES = 16
_MOST_BYTES_AN_ELEMENT = 8 + 8 + 8


class _Stream:
    """One stream of an upload. A newer one ends it, another upload that needs its slot, or the end of its task."""

    def __init__(self) -> None:
        self.limit = asyncio.timeout(None)
        self.ended = asyncio.Event()
        self.gives_way = False
        self.closed_for: str | None = None
        self._ending = False
        self._complete = False
        self._begun_at = time.monotonic()
        self._upload: Upload | None = None
        self._pace: UploadPace | None = None

    async def supersede(self) -> None:
        """End it in favour of a newer one."""
        self._end()
        await self.ended.wait()

    def give_way(self) -> None:
        """End it in favour of another upload."""
        self.gives_way = True
        self._end()

    def close(self, reason: str) -> None:
        """End it because no update of its task is wanted any more."""
        # Once all bytes are here the check of the update says how its stream ends.
        if not self._complete:
            self.closed_for = reason
            self._end()

    def complete(self) -> None:
        """All bytes are here."""
        self._complete = True

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self.limit.reschedule(asyncio.get_running_loop().time())

    def carries(self, upload: Upload) -> None:
        """Its bytes are measured from now on."""
        self._upload = upload
        self._pace = UploadPace.begun(upload.size_bytes, upload.manifest.size_bytes, self._begun_at)

    def bytes_per_second(self, now: float) -> float:
        """How fast it has lately been; without end while that is not known, and once all bytes are there."""
        if self._ending or self._upload is None or self._pace is None or self._upload.complete:
            return math.inf
        self._pace = self._pace.moved(self._upload.size_bytes, now, _PACE_S)
        return math.inf if now - self._begun_at < _PACE_S else self._pace.bytes_per_second(now)

    def left_s(self, now: float) -> float:
        """How much longer it needs at its pace, seconds, once it has had its turn; before that 0."""
        rate = self.bytes_per_second(now)
        if self._upload is None or math.isinf(rate) or now - self._begun_at < _TURN_S:
            return 0.0
        left_bytes = self._upload.manifest.size_bytes - self._upload.size_bytes
        return left_bytes / rate if rate > 0 else math.inf


@dataclass(frozen=True)
class Held:
    """How much of an update is held, whether it is accepted, and how long to wait before the rest is sent."""

    size_bytes: int
    complete: bool
    retry_after_s: float = 0.0


class Receiver:
    """Takes the updates of one run."""

    def __init__(self, coordinator: Coordinator) -> None:
        settings = coordinator.settings
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = settings
        self._journal = coordinator.journal
        self._local_models = coordinator.local_models
        self._limits = Limits(
            max_payload_bytes=settings.max_payload_bytes, max_content_bytes=settings.max_payload_bytes
        )
        self._max_chunk_bytes = settings.max_chunk_bytes
        self._idle_s = settings.policy.lease_s
        self._queue = UploadQueue(settings.max_uploads)
        self._memory = ByteBudget(settings.max_upload_memory_bytes)
        self._decoding = ByteBudget(_DECODING_BYTES)
        self._checkers = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="checking")
        self._streams: dict[str, _Stream] = {}
        self._header_of: Layout = ()
        self._max_header_bytes = _max_header_bytes(())
        # When the first byte of each update came.
        self._begun: dict[str, float] = {}
        coordinator.on_task_closed(self._close_task)

    def _close_task(self, token: str, reason: str) -> None:
        self._begun.pop(token, None)
        self._queue.forget(token)
        if (stream := self._streams.get(token)) is not None:
            stream.close(reason)

    def max_header_bytes(self) -> int:
        """Size of the largest header that an update of this run can need."""
        layout = self._run.layout
        if layout != self._header_of:
            self._header_of, self._max_header_bytes = layout, _max_header_bytes(layout)
        return self._max_header_bytes

    async def receive(self, header: UpdateHeader, chunks: AsyncIterator[Chunk]) -> tuple[int, bool]:
        """Take an update; (committed bytes, whether it is complete and accepted).

        Raises as `PushUpdate` in aggregator.proto says.
        """
        if evaluation := self._run.evaluations.find(header.worker, header.token):
            scores = metrics_from_proto(header.evaluation_metrics)
            if not_finite := metrics_from_proto(dict.fromkeys(header.scores_not_finite, 0.0)):
                log.warning("scores not finite", worker=header.worker, names=sorted(not_finite))
            example_count = claims.EXAMPLES.checked(header.evaluation_example_count)
            await self._coordinator.score(evaluation, scores, example_count)
            return 0, True
        if await self._coordinator.check_open(header.worker, header.token) is TaskPhase.ACCEPTED:
            return header.manifest.size_bytes, True
        manifest, report = self._examine(header)
        async with self._only_stream(header.token):
            if await self._coordinator.check_open(header.worker, header.token) is TaskPhase.ACCEPTED:
                return manifest.size_bytes, True
            self._begun.setdefault(header.token, time.monotonic())
            try:
                return await self._store(header, manifest, report, chunks)
            except StorageError as error:
                self._coordinator.data_folder.failed(Use.UPDATES, error)
                raise

    async def _store(
        self, header: UpdateHeader, manifest: Manifest, report: Report, chunks: AsyncIterator[Chunk]
    ) -> tuple[int, bool]:
        upload = await self._begin(header, manifest)
        self._streams[header.token].carries(upload)
        try:
            await self._take(upload, chunks)
            if not upload.complete:
                return upload.size_bytes, False
            self._streams[header.token].complete()
            await _to_its_end(self._accept(upload, report))
            self._coordinator.data_folder.works(Use.UPDATES)
        except (RoundClosed, asyncio.CancelledError) as error:
            # The round has swept up what there was of its uploads, perhaps before this one was there.
            if isinstance(error, RoundClosed) or self._streams[header.token].closed_for is not None:
                await asyncio.to_thread(upload.discard)
            raise
        finally:
            if not upload.closed:
                await asyncio.to_thread(upload.close)
        return manifest.size_bytes, True

    async def _begin(self, header: UpdateHeader, manifest: Manifest) -> Upload:
        """The upload, begun or continued. Cancelled, it leaves no open file, and none that no round wants."""
        beginning = asyncio.create_task(asyncio.to_thread(self._journal.begin, header, manifest))
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            await _until_done(beginning)
            if beginning.exception() is None:
                upload = beginning.result()
                await asyncio.to_thread(upload.close if self._run.takes_update(header.token) else upload.discard)
            raise

    async def held(self, worker: str, token: str) -> Held:
        """What is held of an update. Raises as `QueryPush` says."""
        if self._run.evaluations.find(worker, token):
            return Held(0, not self._run.evaluations.waiting_for(worker, self._run.version))
        if await self._coordinator.check_open(worker, token) is TaskPhase.ACCEPTED:
            return Held(await self._coordinator.accepted_bytes(token), True)
        # The stream that runs is one of this upload's own: the next takes over from it.
        retry_after_s = 0.0 if token in self._streams else self._queue.wait_s(token)
        if retry_after_s:
            self._free_a_slot()
        size_bytes = await asyncio.to_thread(self._journal.committed_bytes, token)
        return Held(size_bytes, False, retry_after_s)

    def _examine(self, header: UpdateHeader) -> tuple[Manifest, Report]:
        """All that can be known before the first byte. A refusal is final, and on the record."""
        round_, settings = self._run.current, self._settings
        try:
            manifest = manifest_from_proto(header.manifest, self._limits)
            if header.merged_updates and not self._coordinator.fleet.get(header.worker).leads:
                raise UpdateRefused("a mean of updates comes from an aggregator alone")
            if round_.kind is TaskKind.EVALUATE:
                header.example_count = header.example_count or header.evaluation_example_count
                check_layout((), manifest.layout)
            elif round_.kind is TaskKind.INITIALIZE:
                header.example_count = header.example_count or 1
                _check_initial(manifest, settings.max_model_bytes)
            else:
                self._check_layout(header.token, manifest, header.merged_updates > 0)
            report = report_from_proto(header, self._settings.admission)
            if self._coordinator.instructions.normalize_steps and round_.kind is TaskKind.TRAIN:
                examples = self._coordinator.weighing.examples(report.example_count, report)
                check_steps(report, self._coordinator.instructions.plan, examples)
            return manifest, report
        except (LayoutError, TooLargeError, UpdateRefused) as error:
            self._coordinator.reject(header.token, str(error))
            raise

    def _check_layout(self, token: str, manifest: Manifest, merged: bool) -> None:
        """The tensors are those of the model, or of the part of it that the worker was given."""
        round_ = self._run.current
        local = round_.local_task(token)
        if merged:
            check_partial_aggregate(self._run.layout, manifest.layout)
        elif local.plain:
            check_layout(self._run.layout, manifest.layout)
        else:
            kept = self._local_models.kept_channels(local.sub_model, round_.version_of(token))
            local.check_layout(self._run.layout, manifest.layout, kept)

    @asynccontextmanager
    async def _only_stream(self, token: str) -> AsyncIterator[None]:
        """The newest stream of an upload takes over: the one before is most likely a dead connection.

        If it is not, it gets an answer, which a handler that is cancelled would not give.
        """
        while (former := self._streams.get(token)) is not None:
            await former.supersede()
        try:
            self._queue.enter(token)
        except Exhausted:
            self._free_a_slot()
            raise
        self._streams[token] = stream = _Stream()
        try:
            async with stream.limit:
                yield
        except TimeoutError:
            if stream.closed_for is not None:
                raise RoundClosed(stream.closed_for) from None
            if stream.gives_way:
                why = "others wait, and this upload is slow or still needs long; go on later"
                raise Exhausted(why, retry_after_s=_PACE_S) from None
            raise LinkError("a newer stream of this update has taken over") from None
        finally:
            del self._streams[token]
            self._queue.leave()
            stream.ended.set()

    def _free_a_slot(self) -> None:
        """Somebody waits: a stream that hardly uses its slot gives it up, else one that needs long."""
        now = time.monotonic()
        slowest = min(self._streams.values(), key=lambda stream: stream.bytes_per_second(now), default=None)
        if slowest is not None and slowest.bytes_per_second(now) < _LEAST_BYTES_PER_S:
            slowest.give_way()
            return
        longest = max(self._streams.values(), key=lambda stream: stream.left_s(now), default=None)
        if longest is not None and longest.left_s(now) > _PACE_S:
            longest.give_way()

    async def _take(self, upload: Upload, chunks: AsyncIterator[Chunk]) -> None:
        """Commit chunks until the stream ends. A silent stream gives up its slot."""
        told_at = time.monotonic()

        async def still_wanted() -> None:
            nonlocal told_at
            if time.monotonic() - told_at < _PROGRESS_INTERVAL_S:
                return
            told_at = time.monotonic()
            self._tell(upload)

        self._tell(upload)
        reader = UploadReader(upload, self._memory, self._max_chunk_bytes)
        await reader.run(chunks, self._idle_s, still_wanted)

    def _tell(self, upload: Upload) -> None:
        """How far it is. Raises `RoundClosed`."""
        self._run.round_of(upload.header.token)
        held, total = upload.size_bytes, upload.manifest.size_bytes
        progress = Progress(upload.header.token, TaskPhase.UPLOADING, held / total if total else 1.0, held, total)
        self._coordinator.apply(progress)

    async def _accept(self, upload: Upload, report: Report) -> None:
        """Verify the whole update, make it durable, count it."""
        coordinator = self._coordinator
        token = upload.header.token
        took_s = time.monotonic() - self._begun.get(token, time.monotonic())
        try:
            sealed = await self._checked(upload)
        except StorageError:
            # A round that has closed meanwhile has swept its uploads away: that is no fault of the disk.
            if self._run.round is None or token not in self._run.round:
                raise RoundClosed("the round of this task has ended") from None
            raise
        if not isinstance(sealed, StoredUpdate):
            coordinator.reject(token, str(sealed))
            raise sealed
        self._journal.remember(token, sealed)
        try:
            coordinator.accept(token, report.uploaded_in(took_s))
        except RoundClosed:
            await asyncio.to_thread(self._journal.discard, [token])
            raise
        self._begun.pop(token, None)

    async def _checked(self, upload: Upload) -> StoredUpdate | UpdateRefused:
        """As `_verify_and_seal`, once there is memory to decode it: many updates that end at once take turns."""
        size_bytes = _decoding_bytes(upload.manifest)
        await self._decoding.take(size_bytes)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._checkers, self._verify_and_seal, upload, self._run.round)
        finally:
            self._decoding.give_back(size_bytes)

    def _verify_and_seal(self, upload: Upload, round_: RoundInProgress | None) -> StoredUpdate | UpdateRefused:
        """The accepted update, or why it is refused for good. Raises `CorruptError` and `StorageError`."""
        stored = upload.finish()
        try:
            self._check(stored, round_)
        except (CodecError, UpdateRefused) as error:
            upload.discard()
            # The digest matches, so these are the bytes that were sent: `CorruptError` would ask for them again.
            return UpdateRefused(str(error))
        return upload.seal()

    def _check(self, stored: StoredUpdate, round_: RoundInProgress | None) -> None:
        local = LocalTask() if round_ is None else round_.local_task(stored.header.token)
        header = stored.header
        if round_ is not None and round_.kind is TaskKind.EVALUATE:
            return
        update = stored.open()
        with update as reader:
            read, names, layout = reader.tensor, reader.names, self._run.layout
            variances = [spec for spec in layout or stored.manifest.layout if spec.is_variance]
            if header.merged_updates:
                values = partial_aggregate_values(layout, names, read, header.weight)
                check_values(values, self._settings.admission)
                check_variances(partial_aggregate_values(variances, names, read, header.weight))
            elif round_ is not None and round_.kind is TaskKind.INITIALIZE:
                # A statistic that nobody has measured yet, or a mask, may be infinite.
                check_values(
                    ((spec, v) for spec, v in update.pieces() if spec.is_trained), self._settings.admission
                )
                check_variances((spec, read(spec.name)) for spec in variances)
            elif round_ is None or local.plain:
                _check_plain(update, self._settings.admission)
                check_variances((spec, read(spec.name)) for spec in variances if spec.name in names)
            else:
                kept = self._local_models.kept_channels(local.sub_model, round_.version_of(header.token))
                check_values(unpack_all(layout, names, read, kept), self._settings.admission)
                check_variances(unpack_all(variances, names, read, kept))


def _max_header_bytes(layout: Layout) -> int:
    """Of a model of that layout, or of any model that may be proposed where there is none.

    A partial update or a mean lists up to three tensors for one of the model's (NAME, NAME#mask, NAME#codes), with
    float64 weights among them; the channels of the model come beside its manifest.
    """
    if not layout:
        return MAX_MESSAGE_BYTES
    entries = sum(spec.ByteSize() + _ENTRY_BYTES for spec in layout_to_proto(layout))
    frames = _FRAME_BYTES * sum(spec.size for spec in layout) * _MOST_BYTES_AN_ELEMENT // EARLY_CUT_BYTES
    return min(MAX_MESSAGE_BYTES, _OTHER_BYTES + _LISTED * entries + frames)


def _decoding_bytes(manifest: Manifest) -> int:
    """Memory that checking an update may take: it is decoded tensor by tensor, a few arrays of each at a time."""
    return _BESIDE_BYTES + _ARRAYS * max((spec.nbytes for spec in manifest.layout), default=0)


def _check_plain(update: UpdateFile, policy: AdmissionPolicy) -> None:
    values = update.long_pieces() if math.isfinite(policy.max_norm) else update.bounds()
    try:
        check_values(values, policy)
    except UpdateRefused:
        # Only what is refused is looked at tensor by tensor, to say which one it was.
        check_values(update.pieces(), policy)
        raise


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; when cancelled, once it has ended: an update that is here whole outlives its connection."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await _until_done(task)
        if not task.cancelled():
            task.exception()
        raise


async def _until_done(task: asyncio.Task[Any]) -> None:
    """Return once the task has ended, however often this is cancelled meanwhile."""
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            continue


def _check_initial(manifest: Manifest, max_bytes: int) -> None:
    """Initial weights come as they are, as a file would have them: every worker starts from exactly these."""
    if not manifest.entries:
        raise UpdateRefused("initial weights are wanted, and the update has no tensors")
    for entry in manifest.entries:
        if not entry.encoding.lossless:
            raise UpdateRefused(f"initial weights come lossless, {entry.spec.name!r} is {entry.encoding}")
    if wrong := complaint(manifest.layout, max_bytes):
        raise UpdateRefused(f"these initial weights cannot be a model: {wrong}")

"""The worker's side of the `Aggregator` service: domain types in and out, domain errors raised.

Each call is short or resumable, and stands alone: nothing here retries. Streams have no total time limit, since a
slow link may need hours. A stream that moves no byte for `stall_s` ends with a `LinkError`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio

from fedgrpc import tracing
from fedgrpc.aio import BatchPipeline, prefetched
from fedgrpc.codec.chunk import (
    CHUNK_BYTES,
    FIRST_CHUNK_BYTES,
    LARGE_CHUNK_BYTES,
    Chunk,
    ChunkSizer,
    chunk_at,
)
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.codec.payload import Read
from fedgrpc.errors import CorruptError, LayoutError, LinkError, WrongOffset
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.descriptions import ModelDescription, description_to_proto
from fedgrpc.protocol.devices import DeviceProfile, profile_to_proto
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.protocol.secure import keys_to_proto, names_from_proto, parts_from_proto, parts_to_proto
from fedgrpc.protocol.tasks import Registration, Task, WorkerRole, registration_from_proto, task_from_proto
from fedgrpc.protocol.tensors import chunk_from_proto, chunk_to_proto
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rpc import framing
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.identity import Session
from fedgrpc.rpc.status import MAX_RETRY_AFTER_S, domain_errors
from fedgrpc.v1 import (
    aggregator_pb2,
    aggregator_pb2_grpc,
    device_pb2,
    models_pb2,
    models_pb2_grpc,
    privacy_pb2,
    round_pb2,
    tensor_pb2,
)
from fedgrpc.worker.held_model import HeldModel, Source
from fedgrpc.worker.model_folder import ModelFolder, PartialModel
from fedgrpc.worker.task_stream import TaskStream
from fedgrpc.worker.throttle import Pacer, Throttle

_CALL_S: Final = 20.0
_POLL_MARGIN_S: Final = 15.0
_MAX_REASON_CHARS: Final = 500
# A model comes along with its task if the link carries it in this time.
_ALONG_S: Final = 0.1
# A hop to a thread costs about as much as to read a small chunk and write its message.
_BATCH_BYTES: Final = 2 * LARGE_CHUNK_BYTES
_BATCH_CHUNKS: Final = 4

Report = Callable[[float], None]
# Id of a run, the model held of it, the number of new examples, keys for its next secure sum.
HeldOfRun = tuple[str, HeldModel | None, int | None, PublicKeys | None]
Moved = Callable[[float], None]


@dataclass(frozen=True)
class Polled:
    """Answer to a poll: a task, a run to get ready for, a question, none now, or none ever (`run_ended`)."""

    task: Task | None
    message: aggregator_pb2.Task | None
    run_ended: bool
    introduce: aggregator_pb2.RunTerms | None = None
    question: privacy_pb2.SecureQuestion | None = None


@dataclass(frozen=True)
class Told:
    """What a device is told in a secure sum; not `ready`: the wait was over first."""

    ready: bool
    roster: frozenset[str]
    parts: Mapping[str, bytes]


@dataclass(frozen=True)
class HeartbeatReply:
    """Answer to a heartbeat."""

    cancel: bool
    reason: str
    time_left_s: float | None


@dataclass(frozen=True)
class Pushed:
    """Bytes of an update that the aggregator holds, and the wait before the rest is sent."""

    committed_size_bytes: int
    complete: bool
    retry_after_s: float = 0.0


def _ignore(progress: float) -> None:
    return None


class AggregatorClient:
    """Calls of one worker over one channel."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        worker: str,
        throttle: Throttle | None = None,
        stall_s: float = 300.0,
        encodings: Sequence[str] = ENCODING_NAMES,
        clock: Callable[[], float] = time.monotonic,
        session: Session | None = None,
    ) -> None:
        self._worker = worker
        self._own_metadata = () if session is None else session.metadata
        self._tasks: TaskStream | None = None
        self.use(channel)
        self._metadata = self._own_metadata
        self._throttle = throttle or Throttle()
        self._stall_s = stall_s
        self._encodings = encodings
        self._clock = clock
        self._max_chunk_bytes = CHUNK_BYTES
        self._introduced_as: tuple[DeviceProfile, WorkerRole, Collection[str], bool] | None = None
        self._chunk_bytes = FIRST_CHUNK_BYTES
        # The most bytes of a model that may come along with a task, and the one that has: its token, and itself.
        self._along_bytes = FIRST_CHUNK_BYTES
        self._along: tuple[str, aggregator_pb2.TaskModel] | None = None
        # How long the last update of one message took, from its first byte to the acknowledgement.
        self._last_whole_s = 0.0

    def use(self, channel: grpc.aio.Channel) -> None:
        """Make further calls over this channel. Those in progress stay on theirs."""
        self._stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)  # type: ignore[no-untyped-call]
        if self._tasks is not None:
            self._tasks.close()
        self._tasks = TaskStream(self._stub.PollTasks, self._own_metadata)
        self._models: Any = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
        self._pull_model = framing.pull_model(channel)
        self._pull_version = framing.pull_version(channel)
        self._push_update = framing.push_update(channel)
        self._push_whole_update = framing.push_whole(channel)

    async def register(
        self, profile: DeviceProfile, role: WorkerRole, parts: Collection[str] = (), many_runs: bool = False
    ) -> Registration:
        """Register this device, which can do these parts of a local-model plan. Idempotent.

        `many_runs`: it serves every run that it is eligible for.
        """
        request = aggregator_pb2.RegisterRequest(
            worker=self._worker,
            role=role.value,
            device=profile_to_proto(profile),
            encodings=self._encodings,
            compressions=[tensor_pb2.COMPRESSION_NONE, tensor_pb2.COMPRESSION_ZSTD],
            local_model_parts=sorted(parts),
            many_runs=many_runs,
        )
        with domain_errors():
            registration = registration_from_proto(
                await self._stub.Register(request, metadata=self._metadata, timeout=_CALL_S)
            )
        self._max_chunk_bytes = registration.max_chunk_bytes
        self._introduced_as = profile, role, parts, many_runs
        return registration

    async def describe(self, description: ModelDescription, run_id: str = "", refusal: str = "") -> None:
        """Tell what this device knows of the model of a run, or why it takes no tasks of it. Idempotent."""
        request = description_to_proto(self._worker, description)
        request.run_id, request.refusal = run_id, " ".join(refusal.split())[:_MAX_REASON_CHARS]
        with domain_errors():
            await self._stub.DescribeModel(request, metadata=self._metadata, timeout=_CALL_S)

    async def takes_smaller_chunks(self) -> bool:
        """Register again; return whether the aggregator, perhaps restarted, now takes smaller chunks."""
        before = self._max_chunk_bytes
        if self._introduced_as is not None:
            await self.register(*self._introduced_as)
        return self._max_chunk_bytes < before

    @contextmanager
    def _chunk_sizer(self) -> Iterator[ChunkSizer]:
        """Start with the last chunk size of the upload before, or a smaller one if that broke off."""
        most = self._throttle.chunk_bytes(min(LARGE_CHUNK_BYTES, self._max_chunk_bytes))
        sizer = ChunkSizer(most, self._chunk_bytes)
        try:
            yield sizer
        except BaseException:
            sizer.after_break()
            raise
        finally:
            self._chunk_bytes = sizer.chunk_bytes

    async def poll(
        self,
        wait_s: float,
        held: HeldModel | None,
        new_examples: int | None = None,
        others: Collection[HeldOfRun] = (),
        conditions: device_pb2.DeviceConditions | None = None,
        keys: PublicKeys | None = None,
    ) -> Polled:
        """Wait up to `wait_s` for a task; raises UnknownWorker when the aggregator wants a registration.

        `others` have, of each further run, its id, the model held of it, the number of new examples, and `keys`:
        those for the next secure sum.
        """
        request = aggregator_pb2.PollTaskRequest(
            worker=self._worker,
            wait=duration_to_proto(wait_s),
            new_examples=new_examples,
            model_bytes=self._along_bytes,
        )
        if held is not None:
            request.held_version = held.version
            request.held_digest = held.origin_digest
        if keys is not None:
            request.one_time_keys.CopyFrom(keys_to_proto(keys))
        for run_id, model, new, its_keys in others:
            told = request.held.add(run_id=run_id, new_examples=new)
            if its_keys is not None:
                told.one_time_keys.CopyFrom(keys_to_proto(its_keys))
            if model is not None:
                told.held_version, told.held_digest = model.version, model.origin_digest
        if conditions is not None:
            request.conditions.CopyFrom(conditions)
        assert self._tasks is not None
        try:
            reply = await self._tasks.poll(request, wait_s + _POLL_MARGIN_S)
        except LinkError:
            # Its answer may have been too large for the link.
            self._along_bytes = min(self._along_bytes, FIRST_CHUNK_BYTES) // 4
            raise
        if not reply.HasField("task"):
            introduce = reply.introduce if reply.HasField("introduce") else None
            question = reply.question if reply.HasField("question") else None
            return Polled(None, None, reply.run_ended, introduce, question)
        given = reply.task
        self._along = (given.token, reply.model) if reply.HasField("model") else None
        self._metadata = (*self._own_metadata, *tracing.metadata(given.run_id, given.round, given.token))
        try:
            return Polled(task_from_proto(reply.task), reply.task, reply.run_ended)
        except LayoutError as error:
            await self.report_failure(reply.task.token, str(error))
            return Polled(None, None, reply.run_ended)

    async def heartbeat(self, token: str, phase: TaskPhase, progress: float) -> HeartbeatReply:
        """Extend the lease; raises UnknownTask when it is gone."""
        request = aggregator_pb2.HeartbeatRequest(
            worker=self._worker, token=token, phase=round_pb2.TaskPhase.Name(phase.value), progress=progress
        )
        with domain_errors():
            reply = await self._stub.Heartbeat(request, metadata=self._metadata, timeout=_CALL_S)
        time_left_s = duration_from_proto(reply.time_left) if reply.HasField("time_left") else None
        return HeartbeatReply(reply.cancel, reply.reason, time_left_s)

    async def exchange(self, token: str, kind: str, parts: Mapping[str, bytes], wait_s: float) -> Told:
        """Send "shares", "proofs" or "answers" of a secure sum; return what the aggregator then tells."""
        request = aggregator_pb2.ExchangePartsRequest(
            worker=self._worker, token=token, wait=duration_to_proto(wait_s), **{kind: parts_to_proto(parts)}
        )
        with domain_errors():
            reply = await self._stub.ExchangeParts(
                request, metadata=self._metadata, timeout=wait_s + _POLL_MARGIN_S
            )
        return Told(reply.ready, names_from_proto(reply.roster), parts_from_proto(reply.parts))

    async def report_failure(self, token: str, reason: str, timeout_s: float = _CALL_S) -> None:
        """Give a task back; `reason` is one line for the operator."""
        reason = " ".join(reason.split())[:_MAX_REASON_CHARS]
        request = aggregator_pb2.ReportFailureRequest(worker=self._worker, token=token, reason=reason)
        with domain_errors():
            await self._stub.ReportFailure(request, metadata=self._metadata, timeout=timeout_s)

    async def leave(self, timeout_s: float) -> None:
        """Tell the aggregator that this worker ends; raises UnknownWorker when the aggregator does not know it."""
        with domain_errors():
            await self._stub.Leave(
                aggregator_pb2.LeaveRequest(worker=self._worker), metadata=self._metadata, timeout=timeout_s
            )

    async def query_push(self, token: str) -> Pushed:
        """Return how much of the update under `token` the aggregator holds."""
        request = aggregator_pb2.QueryPushRequest(worker=self._worker, token=token)
        with domain_errors():
            reply = await self._stub.QueryPush(request, metadata=self._metadata, timeout=_CALL_S)
        retry_after_s = min(duration_from_proto(reply.retry_after), MAX_RETRY_AFTER_S)
        return Pushed(reply.committed_size_bytes, reply.complete, retry_after_s)

    async def push(
        self, header: aggregator_pb2.UpdateHeader, read: Read, offset: int, report: Report = _ignore
    ) -> bool:
        """Send an update from `offset` on; return whether it is acknowledged, that is verified and durable.

        After False ask `query_push`: the answer itself did not say.

        Raises what the aggregator answers, and LinkError for a lost or stalled connection.
        """
        size_bytes = header.manifest.size_bytes
        pacer = Pacer(self._throttle.link_bits_per_second)
        with domain_errors(), self._chunk_sizer() as sizer:
            if not offset and size_bytes <= min(FIRST_CHUNK_BYTES, sizer.chunk_bytes):
                return await self._push_whole(header, read, pacer, report)
            async with (
                self._stall_guard() as moved,
                _cancelled_on_exit(self._push_update(metadata=self._metadata)) as call,
            ):
                stream = ClientStream(call)
                wanted = await stream.write(aggregator_pb2.PushUpdateRequest(header=header))
                pieces = _chunks(read, size_bytes, offset, sizer)
                async with aclosing(prefetched(lambda: _messages(pieces, size_bytes, sizer))) as messages:
                    async for chunk, message in messages:
                        await pacer.wait(len(chunk.data), moved)
                        sent_s = self._clock()
                        if not wanted or not (wanted := await stream.write(message)):
                            break
                        sizer.note(len(chunk.data), self._clock() - sent_s)
                        moved(0)
                        report((chunk.offset + len(chunk.data)) / size_bytes)
                response = await stream.finish()
        return response is not None and bool(response.complete)

    async def _push_whole(
        self, header: aggregator_pb2.UpdateHeader, read: Read, pacer: Pacer, report: Report
    ) -> bool:
        """Send a small update in one message. Returns as `push` does."""
        request, size_bytes = aggregator_pb2.PushUpdateRequest(header=header), header.manifest.size_bytes
        # The aggregator sees one message and not how long it took. The last one tells.
        request.header.timings.upload_seconds = self._last_whole_s
        if size_bytes:
            chunk = await asyncio.to_thread(chunk_at, read, 0, size_bytes)
            request.whole.CopyFrom(chunk_to_proto(chunk))
        async with self._stall_guard() as moved:
            began_s = self._clock()
            await pacer.wait(size_bytes, moved)
            response = await self._push_whole_update(request, metadata=self._metadata)
            self._last_whole_s = self._clock() - began_s
        report(1.0)
        return bool(response.complete)

    async def pull(
        self, folder: ModelFolder, source: Source, token: str = "", report: Report = _ignore
    ) -> HeldModel:
        """Download a task's model into `folder`, from the byte where the last attempt stopped, unless it is held.

        `token` is that of the task; without one the version of `source`, given by a release, comes raw.

        Raises:
            LinkError: the connection was lost; the bytes received are kept, and the next call resumes there.
            CorruptError: a chunk or the whole payload does not match; the next call resumes or starts over.
            UnknownTask, RoundClosed, NotFound: the aggregator has no such task any more, or no such version.
            LayoutError, TooLargeError: the manifest is refused.
        """
        along, self._along = self._along, None
        if along is not None and token and along[0] == token:
            with suppress(CorruptError, WrongOffset):
                if (taken := await self._taken_along(along[1], folder, source, report)) is not None:
                    return taken
        offset = await asyncio.to_thread(folder.partial_size_bytes, source) if folder.has_partial else 0
        try:
            return await self._pull_from(folder, source, token, offset, report)
        except WrongOffset:
            if not offset:
                raise
        # The aggregator's payload is another than the one whose first bytes are kept here.
        await asyncio.to_thread(folder.drop_partial)
        return await self._pull_from(folder, source, token, 0, report)

    async def _taken_along(
        self, model: aggregator_pb2.TaskModel, folder: ModelFolder, source: Source, report: Report
    ) -> HeldModel | None:
        """Store the model that came along with its task; None: it has to be pulled. Raises as `pull`."""
        header, base = model.header, folder.base_for(source)
        if base is not None and header.base_version == base.version == source.version:
            return base
        if header.base_version and (base is None or base.version != header.base_version):
            return None

        def store() -> HeldModel:
            partial = folder.open_partial(source, header, 0)
            try:
                partial.append([chunk_from_proto(model.chunk)])
            finally:
                partial.close()
            return folder.finish(partial)

        await Pacer(self._throttle.link_bits_per_second).wait(len(model.chunk.data), _ignore)
        held = await asyncio.to_thread(store)
        report(1.0)
        return held

    async def _pull_from(
        self, folder: ModelFolder, source: Source, token: str, offset: int, report: Report
    ) -> HeldModel:
        """Pull one stream from `offset`. Raises WrongOffset when its payload is not the one kept here."""
        base = folder.base_for(source) if token else None
        with domain_errors():
            async with (
                self._stall_guard() as moved,
                _cancelled_on_exit(self._model_stream(source, token, base, offset)) as call,
            ):
                header = _header_of(await call.read())
                if base is not None and header.base_version == base.version == source.version:
                    return base
                partial = await asyncio.to_thread(folder.open_partial, source, header, offset)
                begun_s = self._clock()
                try:
                    await self._receive(call, partial, moved, report)
                finally:
                    partial.close()
                self._note_rate(partial.size_bytes - offset, self._clock() - begun_s)
        return await asyncio.to_thread(folder.finish, partial)

    def _model_stream(self, source: Source, token: str, base: HeldModel | None, offset: int) -> Any:
        if not token:
            released = models_pb2.PullVersionRequest(
                run=source.run, version=source.version, worker=self._worker, offset=offset
            )
            return self._pull_version(released, metadata=self._metadata)
        request = aggregator_pb2.PullModelRequest(worker=self._worker, token=token, offset=offset)
        if base is not None:
            request.base_version, request.base_digest = base.version, base.origin_digest
        return self._pull_model(request, metadata=self._metadata)

    async def follow_releases(
        self, served: Collection[models_pb2.ServedVersion], wait_s: float
    ) -> list[models_pb2.ServedVersion]:
        """Wait up to `wait_s` for something else to serve than `served`; return what to serve."""
        request = models_pb2.FollowReleasesRequest(
            worker=self._worker, served=served, wait=duration_to_proto(wait_s)
        )
        with domain_errors():
            reply = await self._models.FollowReleases(
                request, metadata=self._metadata, timeout=wait_s + _POLL_MARGIN_S
            )
        return list(reply.wanted)

    async def report_release(self, run_id: str, release: int, scores: Mapping[str, float], failure: str) -> None:
        """Tell the scores of a released version, or in one line why this device cannot use it."""
        request = models_pb2.ReportReleaseRequest(
            worker=self._worker,
            run_id=run_id,
            release=release,
            scores=scores,
            failure=" ".join(failure.split())[:_MAX_REASON_CHARS],
        )
        with domain_errors():
            await self._models.ReportRelease(request, metadata=self._metadata, timeout=_CALL_S)

    def _note_rate(self, size_bytes: int, took_s: float) -> None:
        """Note how fast a model came: the next one may come along with its task where the link carries it at once.

        Nobody sees how long a model takes that comes with the answer to a poll, so T_download lacks that.
        """
        carried = min(LARGE_CHUNK_BYTES, int(_ALONG_S * size_bytes / max(took_s, 1e-3)))
        # What is smaller tells of the round trip, too: the link carries more.
        self._along_bytes = carried if size_bytes >= FIRST_CHUNK_BYTES else max(carried, self._along_bytes)

    async def _receive(self, call: Any, partial: PartialModel, moved: Moved, report: Report) -> None:
        pacer = Pacer(self._throttle.link_bits_per_second)
        async with BatchPipeline(partial.append) as pipeline:
            while (chunk := await call.read()) is not grpc.aio.EOF:
                if not isinstance(chunk, Chunk):
                    raise CorruptError("a second header came within a model stream")
                await pacer.wait(len(chunk.data), moved)
                await pipeline.put(chunk)
                moved(0)
                # A payload of no bytes has no chunks: `append` refuses this one. Do not divide by zero before.
                report(partial.size_bytes / max(1, partial.manifest.size_bytes))
            await pipeline.drain()
        if partial.size_bytes < partial.manifest.size_bytes:
            raise LinkError("the model stream ended early")

    @asynccontextmanager
    async def _stall_guard(self) -> AsyncIterator[Moved]:
        """Raise `LinkError` when the yielded function is not called for `stall_s` plus its last argument.

        Keepalive finds dead links. This finds a live peer that hangs.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._stall_s) as limit:
                yield lambda waiting_s: limit.reschedule(loop.time() + waiting_s + self._stall_s)
        except TimeoutError as error:
            raise LinkError(f"no byte moved for {self._stall_s:g} s") from error


def _header_of(message: Any) -> aggregator_pb2.ModelHeader:
    kinds = (aggregator_pb2.PullModelResponse, models_pb2.PullVersionResponse)
    if not isinstance(message, kinds) or not message.HasField("header"):
        raise LinkError("the model stream came without its header")
    return message.header


def _chunks(read: Read, size_bytes: int, offset: int, sizer: ChunkSizer) -> Iterator[Chunk]:
    """Yield the payload's chunks from `offset`, each as large as allowed when it is read. Raises as `chunk_at`."""
    while offset < size_bytes:
        chunk = chunk_at(read, offset, min(sizer.chunk_bytes, size_bytes - offset))
        offset += len(chunk.data)
        yield chunk


def _messages(
    pieces: Iterator[Chunk], size_bytes: int, sizer: ChunkSizer
) -> tuple[list[tuple[Chunk, bytes]], bool]:
    """Return the next chunks of a payload with their messages, and whether more follow.

    They are few, so that a new chunk size has effect at once.
    """
    batch: list[tuple[Chunk, bytes]] = []
    batch_bytes, wanted_bytes = 0, min(_BATCH_BYTES, _BATCH_CHUNKS * sizer.chunk_bytes)
    while batch_bytes < wanted_bytes and (chunk := next(pieces, None)) is not None:
        batch.append((chunk, framing.message_of(chunk)))
        batch_bytes += len(chunk.data)
        # Return the end with the last batch: an empty batch after it would cost another hop to a thread.
        if chunk.offset + len(chunk.data) == size_bytes:
            return batch, False
    return batch, bool(batch)


@asynccontextmanager
async def _cancelled_on_exit(call: Any) -> AsyncIterator[Any]:
    """End the stream on the other side too, for whatever reason the block is left."""
    try:
        yield call
    finally:
        call.cancel()

"""Pushes of updates: a small one whole in one message, a larger one as a stream that resumes at any byte.

The rule: chunks are as large as the link carried last time, at most what the aggregator takes. A stream that
breaks off makes the next one begin smaller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio

from fedgrpc.aio import prefetched
from fedgrpc.codec.chunk import (
    CHUNK_BYTES,
    FIRST_CHUNK_BYTES,
    LARGE_CHUNK_BYTES,
    Chunk,
    ChunkSizer,
    chunk_at,
)
from fedgrpc.codec.payload import Read
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.tensors import chunk_to_proto
from fedgrpc.rpc import framing
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.status import MAX_RETRY_AFTER_S, domain_errors
from fedgrpc.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedgrpc.worker.caller import CALL_S, Caller, Report, cancelled_on_exit, ignore
from fedgrpc.worker.side_streams import Dial, Sending, SideStreams
from fedgrpc.worker.throttle import Pacer, Throttle

# A hop to a thread costs about as much as to read a small chunk and write its message.
_BATCH_BYTES: Final = 2 * LARGE_CHUNK_BYTES
_BATCH_CHUNKS: Final = 4


@dataclass(frozen=True)
class Pushed:
    """Bytes of an update that the aggregator holds, and the wait before the rest is sent."""

    committed_size_bytes: int
    complete: bool
    retry_after_s: float = 0.0


class UpdatePushes:
    """Sends the updates of one worker. `use` gives it a channel, first of all."""

    def __init__(self, caller: Caller, throttle: Throttle, clock: Callable[[], float]) -> None:
        self._caller = caller
        self._throttle = throttle
        self._clock = clock
        # The most that the aggregator takes, told at registration.
        self.max_chunk_bytes = CHUNK_BYTES
        self._chunk_bytes = FIRST_CHUNK_BYTES
        self.sides = SideStreams(caller, clock)
        # How long the last update of one message took, from its first byte to the acknowledgement.
        self._last_whole_s = 0.0

    def use(self, channel: grpc.aio.Channel, dial: Dial | None) -> None:
        """Make further calls over this channel. Those in progress stay on theirs. `dial`: as in `SideStreams`."""
        self.sides.use(dial)
        self._stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)  # type: ignore[no-untyped-call]
        self._push_update = framing.push_update(channel)
        self._push_whole_update = framing.push_whole(channel)

    async def query_push(self, token: str) -> Pushed:
        """Return how much of the update under `token` the aggregator holds."""
        request = aggregator_pb2.QueryPushRequest(worker=self._caller.worker, token=token)
        with domain_errors(), self.sides.timed_call():
            reply = await self._stub.QueryPush(request, metadata=self._caller.metadata, timeout=CALL_S)
        retry_after_s = min(duration_from_proto(reply.retry_after), MAX_RETRY_AFTER_S)
        return Pushed(reply.committed_size_bytes, reply.complete, retry_after_s)

    async def push(
        self, header: aggregator_pb2.UpdateHeader, read: Read, offset: int, report: Report = ignore
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
            if self.sides.must_measure(size_bytes - offset):
                await self.query_push(header.token)
            side_count = self.sides.wanted(size_bytes - offset)
            if side_count:
                # More does not go over a side stream. And over a long round trip no chunk only fills buffers.
                sizer.most, sizer.judged = min(sizer.most, CHUNK_BYTES), 1
            pieces = _chunks(read, size_bytes, offset, sizer)
            async with (
                self._caller.stall_guard() as moved,
                cancelled_on_exit(self._push_update(metadata=self._caller.metadata)) as call,
                aclosing(prefetched(lambda: _messages(pieces, size_bytes, sizer))) as messages,
            ):
                sending = Sending(
                    messages,
                    size_bytes,
                    offset,
                    sizer,
                    pacer,
                    self._clock,
                    self.sides.round_trip_s if side_count else 0.0,
                    moved,
                    report,
                )
                stream = ClientStream(call)
                if await stream.write(aggregator_pb2.PushUpdateRequest(header=header)):
                    async with self.sides.beside(header.token, side_count, sending):
                        await sending.over(stream)
                        response = await stream.finish()
                else:
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
        async with self._caller.stall_guard() as moved:
            began_s = self._clock()
            await pacer.wait(size_bytes, moved)
            response = await self._push_whole_update(request, metadata=self._caller.metadata)
            self._last_whole_s = self._clock() - began_s
        report(1.0)
        return bool(response.complete)

    @contextmanager
    def _chunk_sizer(self) -> Iterator[ChunkSizer]:
        """Start with the last chunk size of the upload before, or a smaller one if that broke off."""
        most = self._throttle.chunk_bytes(min(LARGE_CHUNK_BYTES, self.max_chunk_bytes))
        sizer = ChunkSizer(most, self._chunk_bytes)
        try:
            yield sizer
        except BaseException:
            # A stream that stalls is cancelled, and that is a break like any other.
            sizer.after_break()
            raise
        finally:
            self._chunk_bytes = sizer.chunk_bytes


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
    batch_bytes, wanted_bytes = 0, min(_BATCH_BYTES, min(_BATCH_CHUNKS, sizer.judged) * sizer.chunk_bytes)
    while batch_bytes < wanted_bytes and (chunk := next(pieces, None)) is not None:
        batch.append((chunk, framing.message_of(chunk)))
        batch_bytes += len(chunk.data)
        # Return the end with the last batch: an empty batch after it would cost another hop to a thread.
        if chunk.offset + len(chunk.data) == size_bytes:
            return batch, False
    return batch, bool(batch)

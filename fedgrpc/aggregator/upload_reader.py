"""Reader of one upload: from the messages of its calls to its file, within a bound on memory for all uploads.

The rule: no message is read before there is memory for it, and the memory is given back once its bytes are in
the file. So all uploads together use bounded memory. A reader whose sender is silent gives its reservation back
after a grace time, so that nobody waits for it: each such reader may exceed the bound by one chunk.

gRPC lets about 1 MiB of a stream be on its way, so over a long round trip an upload has side streams, which carry
some of its chunks (`chunk_order`). A side stream has memory for one chunk of its own, outside the bound, for as
long as it lives: if it had to wait for memory that chunks behind its own hold, neither could go on.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import grpc.aio

from fedgrpc.aggregator.chunk_order import ENDED, ChunkOrder
from fedgrpc.aio import BatchPipeline
from fedgrpc.codec.chunk import CHUNK_BYTES, Chunk
from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import LayoutError, LinkError, TooLargeError
from fedgrpc.rpc.framing import SIDE_KEY
from fedgrpc.rpc.relayed_calls import RelayedCall

_LEAST_BYTES = 16 << 10
# A chunk costs some 100 us, however small it is, so many tiny chunks are refused. A few are harmless.
_LEAST_MEAN_BYTES = 512
_FEW_CHUNKS = 256
_GRACE_S = 0.25
# A process that worked for this share of the grace time, on any number of cores, keeps its senders waiting itself:
# it grants the time again, at most so often.
_BUSY_SHARE = 0.5
_MOST_GRACES = 8


class ByteBudget:
    """Hands out `limit_bytes` in the order of asking. Lives on one event loop.

    One who asks for more than the whole gets it alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def taken_bytes(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    async def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` are free, and hold them until they are given back."""
        if not self._waiting and self._fits(size_bytes):
            self._taken += size_bytes
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(size_bytes)
            elif (size_bytes, granted) in self._waiting:
                self._waiting.remove((size_bytes, granted))
                self._grant()
            raise

    def give_back(self, size_bytes: int) -> None:
        """Return bytes to the budget. A negative number takes that many more than were asked for."""
        self._taken -= size_bytes
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            wanted, granted = self._waiting[0]
            if not granted.done():
                if not self._fits(wanted):
                    return
                self._taken += wanted
                granted.set_result(None)
            self._waiting.popleft()

    def _fits(self, size_bytes: int) -> bool:
        return not self._taken or self._taken + size_bytes <= self._limit


class UploadChunks:
    """The chunks of an update, read from its call one at a time. None is kept here."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def begin(self) -> None:
        """Tell the sender of a side stream that its chunks are read."""
        await self._context.send_initial_metadata(((SIDE_KEY, "granted"),))

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        message = await self._context.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return chunk_of(message)

    @property
    def relayed(self) -> RelayedCall | None:
        """The call, where an ingest process can take its chunks; None: they are to be read here."""
        return self._context if isinstance(self._context, RelayedCall) else None


def chunk_of(message: object) -> Chunk:
    """Return a message as a chunk. Raises `LayoutError` for any other."""
    if not isinstance(message, Chunk):
        raise LayoutError("after the first message of an update come chunks, nothing else")
    return message


class Arriving(Protocol):
    """An upload as its reader sees it; `size_bytes` 0 where its file is opened with its first bytes."""

    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """Bytes that are in its file."""

    def append(self, batch: Sequence[Chunk]) -> None:
        """Commit chunks; runs in a thread. Raises as `Upload.append`."""


class UploadReader:
    """Reads the chunks of one upload into its file. `worked_s` returns the process's CPU time, seconds."""

    def __init__(
        self,
        upload: Arriving,
        budget: ByteBudget,
        max_chunk_bytes: int,
        worked_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._upload = upload
        self._budget = budget
        self._max_chunk_bytes = max_chunk_bytes
        self._expected_bytes = max_chunk_bytes
        self._worked_s = worked_s
        self._order = ChunkOrder(upload.size_bytes)
        self._idle_s = 0.0
        self._limit = asyncio.timeout(None)
        self._pipeline: BatchPipeline[Chunk] | None = None
        self._reading = False
        self._reserved = 0
        self._read_bytes = self._count = 0
        self._last_bytes = 0
        # Offsets of the chunks of side streams that are not in the file yet: their memory is outside the budget.
        self._outside: set[int] = set()

    @property
    def side_count(self) -> int:
        """Number of side streams."""
        return self._order.side_count

    async def run(
        self, chunks: AsyncIterator[Chunk], idle_s: float, still_wanted: Callable[[], Awaitable[None]]
    ) -> Chunk | None:
        """Commit chunks until the streams end; `still_wanted` is asked after each and raises when they are not.

        Returns the chunk that completes the payload, for the caller to commit along with what follows in a thread,
        and then to `release`; None: the streams have ended before, or all is committed. Raises as `Upload.append`
        does, and `LinkError` when nothing comes for `idle_s`.
        """
        self._idle_s = idle_s
        try:
            async with (
                self._limit,
                BatchPipeline(self._append, done=self._committed, failed=self._failed) as self._pipeline,
            ):
                while (chunk := await self._next(chunks)) is not None:
                    if self._order.next_offset == self._upload.manifest.size_bytes:
                        break
                    await self._pipeline.put(chunk)
                    # Release the chunk here: the wait for more memory can be long.
                    del chunk
                    await still_wanted()
                last = None if chunk is None else await self._end(chunks, [chunk], self._pipeline)
                await self._pipeline.drain()
                return last
        except TimeoutError:
            raise self._order.error or LinkError(f"no byte came for {idle_s:g} s") from None
        finally:
            self._pipeline = None
            self._order.end_sides()

    async def beside(self, chunks: UploadChunks) -> None:
        """Commit the chunks of a side stream, until it ends.

        Its own error, and its loss, end `run` too: a chunk may be missing. Raises `LinkError` once `run` has
        ended.
        """
        if self._pipeline is None:
            raise LinkError(ENDED)
        try:
            async with self._order.side():
                await chunks.begin()
                async for chunk in chunks:
                    await self._take_beside(chunk)
        except BaseException:
            self._failed()
            raise

    async def _take_beside(self, chunk: Chunk) -> None:
        """Commit a chunk of a side stream in its turn, and return once it is in the file."""
        self._check(chunk, min(CHUNK_BYTES, self._max_chunk_bytes))
        self._end_in(self._idle_s)
        await self._order.await_turn(chunk)
        if self._pipeline is None:
            raise LinkError(ENDED)
        self._outside.add(chunk.offset)
        end = chunk.offset + len(chunk.data)
        self._order.advance(len(chunk.data))
        await self._pipeline.put(chunk)
        # One chunk of each side stream is in memory, and no more.
        while self._upload.size_bytes < end:
            await self._order.moved()

    async def _next(self, chunks: AsyncIterator[Chunk]) -> Chunk | None:
        """Return the stream's next chunk in its turn, its size taken from the budget; None at the end of all."""
        await self._reserve()
        with self._waiting():
            chunk = await self._read(chunks)
            try:
                if chunk is None:
                    await self._order.until_alone()
                else:
                    await self._order.await_turn(chunk)
                    self._order.advance(len(chunk.data))
            except BaseException:
                # Cancelled, too: nobody else gives these bytes back.
                self._budget.give_back(0 if chunk is None else len(chunk.data))
                raise
        return chunk

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Context in which `run` ends when nothing comes for long, or with an error of another stream."""
        self._reading = True
        self._end_in(self._idle_s)
        try:
            yield
        finally:
            self._end_in(None)
            self._reading = False

    def _failed(self) -> None:
        # The sender may be silent: end the wait for its next chunk, so that it learns of it now.
        self._end_in(0.0)

    def _end_in(self, delay_s: float | None) -> None:
        """Let the wait for chunks end after this time; None: not at all."""
        if self._order.error is not None and delay_s:
            delay_s = 0.0
        if self._reading and not self._limit.expired():
            self._limit.reschedule(None if delay_s is None else asyncio.get_running_loop().time() + delay_s)

    async def _end(
        self, chunks: AsyncIterator[Chunk], last: list[Chunk], pipeline: BatchPipeline[Chunk]
    ) -> Chunk | None:
        """Read the end of a stream whose payload is complete; return its last chunk, unless it is committed here.

        A sender that keeps the end back holds no memory, and one that breaks off here loses nothing.
        """

        def commit() -> None:
            while last:
                pipeline.add(last.pop())

        timer = asyncio.get_running_loop().call_later(_GRACE_S, commit)
        try:
            with self._waiting():
                if await anext(chunks, None) is not None:
                    declared = self._upload.manifest.size_bytes
                    raise TooLargeError(f"a chunk behind the {declared} bytes that were declared")
                await self._order.until_alone()
        except BaseException:
            commit()
            raise
        finally:
            timer.cancel()
        self._last_bytes = sum(len(chunk.data) for chunk in last)
        return last[0] if last else None

    def release(self) -> None:
        """Give back the memory of the chunk that `run` has returned."""
        self._budget.give_back(self._last_bytes)
        self._last_bytes = 0

    async def _reserve(self) -> None:
        left = self._upload.manifest.size_bytes - self._order.next_offset
        size = min(self._expected_bytes, max(left, _LEAST_BYTES))
        await self._budget.take(size)
        self._reserved = size

    def _start_grace_timer(self, times: int) -> None:
        loop, worked_s = asyncio.get_running_loop(), self._worked_s()
        self._grace_timer = loop.call_later(_GRACE_S, self._end_grace, worked_s, times)

    def _end_grace(self, worked_s: float, times: int) -> None:
        """Give the reservation back, unless this process was too busy to read: then start another grace time."""
        if times and self._worked_s() - worked_s > _BUSY_SHARE * _GRACE_S:
            self._start_grace_timer(times - 1)
        else:
            self._hold_only()

    def _hold_only(self, size: int = 0) -> None:
        """Hold `size` bytes of the budget in place of the reservation."""
        reserved, self._reserved = self._reserved, 0
        self._budget.give_back(reserved - size)

    async def _read(self, chunks: AsyncIterator[Chunk]) -> Chunk | None:
        """Return the next chunk, its size taken from the budget; None at the end."""
        size, begun = 0, time.monotonic()
        self._start_grace_timer(_MOST_GRACES)
        try:
            chunk = await anext(chunks, None)
            if chunk is None:
                return None
            self._check(chunk, self._max_chunk_bytes)
            size = len(chunk.data)
        finally:
            self._grace_timer.cancel()
            self._hold_only(size)
        # A slow sender will send chunks of this size again; any other may send the largest allowed.
        hesitated = time.monotonic() - begun >= _GRACE_S
        self._expected_bytes = max(size, _LEAST_BYTES) if hesitated else self._max_chunk_bytes
        if self._count == 1 and not self._order.had_sides:
            # Where the file ends is found once it is opened, with these bytes in hand.
            self._order.next_offset = chunk.offset
        return chunk

    def _check(self, chunk: Chunk, max_bytes: int) -> None:
        """Check what needs no bytes; the thread that writes checks the rest."""
        if len(chunk.data) > max_bytes:
            raise TooLargeError(f"a chunk of {len(chunk.data)} bytes; allowed are {max_bytes}")
        if not len(chunk.data):
            raise LayoutError(f"the chunk at offset {chunk.offset} is empty")
        self._count += 1
        if self._count > _FEW_CHUNKS + self._read_bytes // _LEAST_MEAN_BYTES:
            raise LayoutError(f"chunks of less than {_LEAST_MEAN_BYTES} bytes on average; send larger ones")
        self._read_bytes += len(chunk.data)

    def _append(self, batch: Sequence[Chunk]) -> None:
        try:
            self._upload.append(batch)
        except Exception as error:
            # Raised in a thread: the streams learn of it by the order, whatever it is.
            self._order.fail(error)
            raise

    def _committed(self, batch: Sequence[Chunk]) -> None:
        self._budget.give_back(sum(len(chunk.data) for chunk in batch if chunk.offset not in self._outside))
        self._outside -= {chunk.offset for chunk in batch}
        self._order.stored()

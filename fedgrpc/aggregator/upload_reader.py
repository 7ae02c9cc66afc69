"""Reader of one upload: from the messages of its call to its file, within a bound on memory for all uploads.

The rule: no message is read before there is memory for it, and the memory is given back once its bytes are in
the file. So all uploads together use bounded memory. A reader whose sender is silent gives its reservation back
after a grace time, so that nobody waits for it: each such reader may exceed the bound by one chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import grpc.aio

from fedgrpc.aio import BatchPipeline
from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import LayoutError, LinkError, TooLargeError, WrongOffset

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
            raise

    def give_back(self, size_bytes: int) -> None:
        """Return bytes to the budget. A negative number takes that many more than were asked for."""
        self._taken -= size_bytes
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

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        message = await self._context.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        if not isinstance(message, Chunk):
            raise LayoutError("after the header of an update come chunks, nothing else")
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
    """Reads the chunks of one stream into `upload`. `worked_s` returns the process's CPU time, seconds."""

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
        self._next_offset = upload.size_bytes
        self._reading = False
        self._reserved = 0
        self._read_bytes = self._count = 0
        self._last_bytes = 0

    async def run(
        self, chunks: AsyncIterator[Chunk], idle_s: float, still_wanted: Callable[[], Awaitable[None]]
    ) -> Chunk | None:
        """Commit chunks until the stream ends; `still_wanted` is asked after each and raises when they are not.

        Returns the chunk that completes the payload, for the caller to commit along with what follows in a thread,
        and then to `release`; None: the stream has ended before. Raises as `Upload.append` does, and `LinkError`
        when nothing comes for `idle_s`.
        """
        loop = asyncio.get_running_loop()
        pipeline: BatchPipeline[Chunk] | None = None
        try:
            async with asyncio.timeout(None) as limit:

                def failed() -> None:
                    # The sender may be silent: end the wait for its next chunk, so that it learns of it now.
                    if self._reading:
                        limit.reschedule(loop.time())

                async with BatchPipeline(self._upload.append, done=self._committed, failed=failed) as pipeline:
                    while True:
                        await self._reserve()
                        limit.reschedule(loop.time() + idle_s)
                        chunk = await self._read(chunks)
                        if chunk is None or self._next_offset == self._upload.manifest.size_bytes:
                            break
                        limit.reschedule(None)
                        await pipeline.put(chunk)
                        # Release the chunk here: the wait for more memory can be long.
                        del chunk
                        await still_wanted()
                    last = None if chunk is None else await self._end(chunks, [chunk], pipeline)
                    limit.reschedule(None)
                    await pipeline.drain()
                    return last
        except TimeoutError:
            if pipeline is not None:
                await pipeline.drain()
            raise LinkError(f"no byte came for {idle_s:g} s") from None

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
            if await anext(chunks, None) is not None:
                declared = self._upload.manifest.size_bytes
                raise TooLargeError(f"a chunk behind the {declared} bytes that were declared")
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
        left = self._upload.manifest.size_bytes - self._next_offset
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
        self._reading = True
        self._start_grace_timer(_MOST_GRACES)
        try:
            chunk = await anext(chunks, None)
            if chunk is None:
                return None
            self._check(chunk)
            size = len(chunk.data)
        finally:
            self._reading = False
            self._grace_timer.cancel()
            self._hold_only(size)
        # A slow sender will send chunks of this size again; any other may send the largest allowed.
        hesitated = time.monotonic() - begun >= _GRACE_S
        self._expected_bytes = max(size, _LEAST_BYTES) if hesitated else self._max_chunk_bytes
        self._next_offset += size
        self._read_bytes += size
        return chunk

    def _check(self, chunk: Chunk) -> None:
        """Check what needs no bytes; the thread that writes checks the rest."""
        if len(chunk.data) > self._max_chunk_bytes:
            raise TooLargeError(f"a chunk of {len(chunk.data)} bytes; allowed are {self._max_chunk_bytes}")
        self._count += 1
        if self._count > _FEW_CHUNKS + self._read_bytes // _LEAST_MEAN_BYTES:
            raise LayoutError(f"chunks of less than {_LEAST_MEAN_BYTES} bytes on average; send larger ones")
        if self._count == 1:
            # Where the file ends is found once it is opened, with these bytes in hand.
            self._next_offset = chunk.offset
        if chunk.offset != self._next_offset:
            raise WrongOffset(f"the chunk starts at offset {chunk.offset}, expected {self._next_offset}")

    def _committed(self, batch: Sequence[Chunk]) -> None:
        self._budget.give_back(sum(len(chunk.data) for chunk in batch))

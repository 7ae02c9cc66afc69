"""One upload on its way from the wire to its file.

The rule: no message is read before there is memory for it, and that is given back when its bytes are in the file.
So the memory of all uploads together has a bound. A sender that keeps an idle reader waiting holds none of it, so
that nobody waits for a silent one: the bound is then exceeded by one chunk of each of those.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from fedgrpc.aggregator.memory import ByteBudget
from fedgrpc.aggregator.uploads import Upload
from fedgrpc.codec.chunk import Chunk
from fedgrpc.errors import LayoutError, LinkError, TooLargeError, WrongOffset
from fedgrpc.rpc.lane import Lane

_LEAST_BYTES = 16 << 10
# A chunk costs some 100 us, however small it is. A few small ones are anybody's.
_LEAST_MEAN_BYTES = 512
_FEW_CHUNKS = 256
_PATIENCE_S = 0.25
# Of the time, on any number of cores; and how often a busy process is patient again.
_BUSY_SHARE = 0.5
_MOST_PATIENCE = 8


class Intake:
    """Takes the chunks of one stream into `upload`. `worked_s` tells how long this process has worked, seconds."""

    def __init__(
        self,
        upload: Upload,
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
        self._began_at, self._count = upload.size_bytes, 0

    async def run(
        self, chunks: AsyncIterator[Chunk], idle_s: float, still_wanted: Callable[[], Awaitable[None]]
    ) -> None:
        """Commit chunks until the stream ends; `still_wanted` is asked after each and raises when they are not.

        Raises as `Upload.append` does, and `LinkError` when nothing comes for `idle_s`.
        """
        loop = asyncio.get_running_loop()
        lane: Lane[Chunk] | None = None
        try:
            async with asyncio.timeout(None) as limit:

                def failed() -> None:
                    # Nothing more may come, and the sender is to hear of it now.
                    if self._reading:
                        limit.reschedule(loop.time())

                async with Lane(self._upload.append, done=self._committed, failed=failed) as lane:
                    while True:
                        await self._reserve()
                        limit.reschedule(loop.time() + idle_s)
                        chunk = await self._read(chunks)
                        limit.reschedule(None)
                        if chunk is None:
                            return await lane.drain()
                        await lane.put(chunk)
                        # Once it is in the file nothing may hold it: the wait for more memory can be long.
                        del chunk
                        await still_wanted()
        except TimeoutError:
            if lane is not None:
                await lane.drain()
            raise LinkError(f"no byte came for {idle_s:g} s") from None

    async def _reserve(self) -> None:
        left = self._upload.manifest.size_bytes - self._next_offset
        size = min(self._expected_bytes, max(left, _LEAST_BYTES))
        await self._budget.take(size)
        self._reserved = size

    def _be_patient(self, times: int) -> None:
        loop, worked_s = asyncio.get_running_loop(), self._worked_s()
        self._impatience = loop.call_later(_PATIENCE_S, self._lose_patience, worked_s, times)

    def _lose_patience(self, worked_s: float, times: int) -> None:
        """Where this process was busy all the while, it is not the sender who keeps it waiting."""
        if times and self._worked_s() - worked_s > _BUSY_SHARE * _PATIENCE_S:
            self._be_patient(times - 1)
        else:
            self._settle()

    def _settle(self, size: int = 0) -> None:
        """Hold `size` bytes of the budget in place of what is reserved."""
        reserved, self._reserved = self._reserved, 0
        self._budget.give_back(reserved - size)

    async def _read(self, chunks: AsyncIterator[Chunk]) -> Chunk | None:
        """The next chunk, with its size taken from the budget; None at the end."""
        size, begun = 0, time.monotonic()
        self._reading = True
        self._be_patient(_MOST_PATIENCE)
        try:
            chunk = await anext(chunks, None)
            if chunk is None:
                return None
            self._check(chunk)
            size = len(chunk.data)
        finally:
            self._reading = False
            self._impatience.cancel()
            self._settle(size)
        # One who hesitates goes on as it does; anybody else may send larger chunks the next time.
        hesitated = time.monotonic() - begun >= _PATIENCE_S
        self._expected_bytes = max(size, _LEAST_BYTES) if hesitated else self._max_chunk_bytes
        self._next_offset += size
        return chunk

    def _check(self, chunk: Chunk) -> None:
        """What can be told at once; the rest is found out in the thread."""
        if len(chunk.data) > self._max_chunk_bytes:
            raise TooLargeError(f"a chunk of {len(chunk.data)} bytes; allowed are {self._max_chunk_bytes}")
        self._count += 1
        if self._count > _FEW_CHUNKS + (self._next_offset - self._began_at) // _LEAST_MEAN_BYTES:
            raise LayoutError(f"chunks of less than {_LEAST_MEAN_BYTES} bytes on average; send larger ones")
        if chunk.offset != self._next_offset:
            raise WrongOffset(f"the chunk starts at offset {chunk.offset}, expected is {self._next_offset}")

    def _committed(self, batch: Sequence[Chunk]) -> None:
        self._budget.give_back(sum(len(chunk.data) for chunk in batch))

"""Order of one upload's chunks, which come over several streams: its own, and side streams.

The rule: chunks go to the file in the order of the payload, whatever they come over. One that comes early waits
for those before it, as long as there is a stream that may bring them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedgrpc.aio import Changes
from fedgrpc.codec.chunk import Chunk
from fedgrpc.errors import FedgrpcError, LinkError, WrongOffset

_BROKE_OFF = "a side stream of this upload broke off"
ENDED = "the upload of this side stream has ended"


class ChunkOrder:
    """Position of an upload's next chunk, and its side streams. Lives on one event loop."""

    def __init__(self, next_offset: int) -> None:
        self.next_offset = next_offset
        # The first error of any stream, which ends all of them.
        self.error: Exception | None = None
        self.had_sides = False
        self._sides: set[asyncio.Timeout] = set()
        # Of the chunks that wait; whether the stream with the header has ended.
        self._offsets: list[int] = []
        self._is_at_end = False
        self._moved = Changes()

    @property
    def side_count(self) -> int:
        """Number of side streams."""
        return len(self._sides)

    @asynccontextmanager
    async def side(self) -> AsyncIterator[None]:
        """Context of a side stream. `end_sides` ends it with a `LinkError`, and its error is one of the upload."""
        try:
            async with asyncio.timeout(None) as limit:
                self._sides.add(limit)
                self.had_sides = True
                try:
                    yield
                finally:
                    self._sides.discard(limit)
        except TimeoutError:
            raise LinkError(ENDED) from None
        except BaseException as error:
            # Cancelled, too: chunks that this stream has taken may be missing.
            self.fail(error if isinstance(error, FedgrpcError) else LinkError(_BROKE_OFF))
            raise
        finally:
            self._moved.notify()

    def end_sides(self) -> None:
        """End all side streams."""
        for limit in self._sides:
            limit.reschedule(asyncio.get_running_loop().time())

    def fail(self, error: Exception) -> None:
        """Note an error. The first one counts. From any thread."""
        self.error = self.error or error

    async def await_turn(self, chunk: Chunk) -> None:
        """Wait until all before this chunk has come. Raises `WrongOffset` if it cannot, and a stream's error."""
        self._offsets.append(chunk.offset)
        try:
            while chunk.offset != self.next_offset:
                if chunk.offset < self.next_offset or self._all_are_early():
                    raise self.error or self._gap(chunk)
                await self.moved()
        finally:
            self._offsets.remove(chunk.offset)

    def _all_are_early(self) -> bool:
        """Return whether every stream waits for a chunk that none of them can bring."""
        early = sum(offset > self.next_offset for offset in self._offsets)
        return early >= len(self._sides) + (not self._is_at_end)

    def advance(self, size_bytes: int) -> None:
        """Note that the next chunk has come."""
        self.next_offset += size_bytes
        self._moved.notify()

    def stored(self) -> None:
        """Wake those that wait for their chunk to be in the file."""
        self._moved.notify()

    async def moved(self) -> None:
        """Wait for any change."""
        await self._moved.wait(self._moved.revision)

    async def until_alone(self) -> None:
        """Wait until all side streams have ended, as the other one has. Raises the first error of any."""
        self._is_at_end = True
        self._moved.notify()
        while self._sides:
            await self.moved()
        if self.error is not None:
            raise self.error

    def _gap(self, chunk: Chunk) -> FedgrpcError:
        if self.had_sides and chunk.offset > self.next_offset:
            # gRPC shows a stream that was lost as one that has ended.
            return LinkError(_BROKE_OFF)
        return WrongOffset(f"the chunk starts at offset {chunk.offset}, expected {self.next_offset}")

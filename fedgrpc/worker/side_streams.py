"""Side streams of an upload over a long round trip.

gRPC lets about 1 MiB of a stream be on its way to a server, whatever the link carries. So where a round trip takes
long, side streams carry chunks of the same update. Each has a connection of its own: on one connection the next
message of one stream alone may begin before the round trip is over. The aggregator says for how many it has
memory.

The rule: the next chunk goes over whichever stream has sent its last one. The stream with the header alone says
what becomes of the update. When a side stream breaks off, the aggregator ends that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import grpc.aio

from fedgrpc.codec.chunk import Chunk, ChunkSizer
from fedgrpc.rpc import framing
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.caller import Caller, Moved, Report, cancelled_on_exit
from fedgrpc.worker.throttle import Pacer

Dial = Callable[[], grpc.aio.Channel]

# From here on an aggregator is far. A stream carries about 1 MiB in two round trips: its window opens once the
# message has begun. So one stream more for each 5 ms of a round trip makes 100 MiB a second at most.
_FAR_S: Final = 0.01
_EACH_S: Final = 0.005
_MOST: Final = 15
_LONGEST_ROUND_TRIP_S: Final = 0.5
# Of the update for each of them: less is not worth a connection.
_SHARE_BYTES: Final = 2 << 20
# For an update of less, a call to learn of the round trip is not worth it.
_LARGE_BYTES: Final = 4 << 20
# A link that carries 64 KiB for each stream in less than ten seconds, well below any lease.
_LEAST_BYTES_PER_S: Final = 128 << 10


class Sending:
    """One update on its way. `round_trip_s` is what the window of a stream takes to open."""

    def __init__(
        self,
        messages: AsyncGenerator[tuple[Chunk, bytes]],
        size_bytes: int,
        sent_bytes: int,
        sizer: ChunkSizer,
        pacer: Pacer,
        clock: Callable[[], float],
        round_trip_s: float,
        moved: Moved,
        report: Report,
    ) -> None:
        self._messages = messages
        self._size_bytes, self._sent_bytes = size_bytes, sent_bytes
        self._sizer, self._pacer = sizer, pacer
        # Where small calls take longer, it is not the way that does.
        self._clock, self._round_trip_s = clock, min(round_trip_s, _LONGEST_ROUND_TRIP_S)
        self._moved, self._report = moved, report
        self._asking = asyncio.Lock()
        # Reading the payload failed: no stream goes on, whichever of them has met it.
        self._error: Exception | None = None
        # Set once a chunk of each stream takes less than a lease, and at the end.
        self.may_spread = asyncio.Event()

    async def over(self, stream: ClientStream) -> None:
        """Send chunks over this stream, until there are none or it takes no more. Raises what reading one does."""
        while (item := await self._next()) is not None:
            chunk, message = item
            await self._pacer.wait(len(chunk.data), self._moved)
            sent_s = self._clock()
            if not await stream.write(message):
                break
            took_s = max(0.0, self._clock() - sent_s - self._round_trip_s)
            self._sizer.note(len(chunk.data), took_s)
            if len(chunk.data) >= _LEAST_BYTES_PER_S * took_s:
                self.may_spread.set()
            self._moved(0)
            self._sent_bytes += len(chunk.data)
            self._report(self._sent_bytes / self._size_bytes)
        self.may_spread.set()
        if self._error is not None:
            raise self._error

    async def _next(self) -> tuple[Chunk, bytes] | None:
        async with self._asking:
            if self._error is not None:
                raise self._error
            try:
                return await anext(self._messages, None)
            except Exception as error:
                # Whichever stream asked for this chunk: the others end with the same error.
                self._error = error
                raise


class SideStreams:
    """Opens the side streams of one worker's uploads. `use` gives it a connection, first of all."""

    def __init__(self, caller: Caller, clock: Callable[[], float]) -> None:
        self._caller = caller
        self._clock = clock
        # The shortest time of a small call; 0: not known.
        self.round_trip_s = 0.0
        # What the aggregator granted last, and some more.
        self._most = _MOST

    def use(self, dial: Dial | None) -> None:
        """Open side streams over channels that `dial` makes; without it there are none."""
        self._dial = dial
        self.round_trip_s = 0.0

    @contextmanager
    def timed_call(self) -> Iterator[None]:
        """Context of a small call, which tells how far the aggregator is."""
        began_s = self._clock()
        yield
        took_s = self._clock() - began_s
        self.round_trip_s = min(self.round_trip_s or took_s, took_s)

    def must_measure(self, left_bytes: int) -> bool:
        """Return whether so many bytes may need side streams while the distance to the aggregator is unknown."""
        return self._dial is not None and not self.round_trip_s and left_bytes >= _LARGE_BYTES

    def wanted(self, left_bytes: int) -> int:
        """Return how many pay for so many bytes; 0 where one stream is enough."""
        if self._dial is None or self.round_trip_s < _FAR_S:
            return 0
        return min(self._most, int(self.round_trip_s / _EACH_S), left_bytes // _SHARE_BYTES)

    @asynccontextmanager
    async def beside(self, token: str, count: int, sending: Sending) -> AsyncIterator[None]:
        """Let up to `count` side streams send, too, while the block runs."""
        sides = [asyncio.create_task(self._send(token, sending)) for _ in range(count)]
        try:
            yield
        finally:
            for side in sides:
                side.cancel()
            # Their errors are those of the upload, which says them itself.
            granted = sum(each is True for each in await asyncio.gather(*sides, return_exceptions=True))
            if sides:
                self._most = min(_MOST, 2 * granted) if granted == count else max(1, granted)

    async def _send(self, token: str, sending: Sending) -> bool:
        """Send over one side stream; return whether the aggregator granted it."""
        assert self._dial is not None
        request = aggregator_pb2.PushUpdateRequest(beside={"worker": self._caller.worker, "token": token})
        async with (
            self._dial() as channel,
            cancelled_on_exit(framing.push_update(channel)(metadata=self._caller.metadata)) as call,
        ):
            stream = ClientStream(call)
            await stream.write(request)
            if framing.SIDE_KEY not in await call.initial_metadata():
                return False
            await sending.may_spread.wait()
            await sending.over(stream)
            await stream.finish()
        return True

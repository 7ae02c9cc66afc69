"""Admission of uploads: a bounded number of slots, one stream in each, and reserved times for those without one.

The rule: no upload waits on an open stream. An upload without a slot is refused with a delay: by then those before
it have been served, at the rate at which slots become free. Once the delay is over a slot stays reserved for it,
for `_LATE_S`. After that anybody may take it. Meanwhile a stream that hardly uses its slot gives it up.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from fedgrpc.aggregator.upload_reader import Arriving
from fedgrpc.errors import Exhausted, LinkError, RoundClosed
from fedgrpc.rounds.task import UploadPace

# Slots that became free lately, of which the rate is estimated, and how many an estimate needs.
_SAMPLES: Final = 64
_LEAST_SAMPLES: Final = 8
# The observed rate is limited by how fast uploads come back. Answering with it unchanged would slow them further.
_HASTE: Final = 0.8
# Assumed time an upload holds its slot, until one has left its slot.
_GUESS_S: Final = 0.25
# A shorter wait costs both sides more calls than it saves time.
_SHORTEST_S: Final = 0.05
# Estimates err, so a long wait is cut into several.
_LONGEST_S: Final = 300.0
# How long after its time a slot stays reserved for an upload.
_LATE_S: Final = 2.0
# Above this many an upload still waits, but without a reservation: the queue is bounded.
_MAX_WAITING: Final = 100_000
# A stream that is slower than this, measured over one to two such times, leaves its slot to one who waits. In
# that time a link of 5 kB/s brings the 64 KiB that an upload over an unknown link begins with.
_LEAST_BYTES_PER_S = 1024
_PACE_S = 15.0
# Where others wait, one that needs much longer than this gives its slot up in between: whoever fills all slots
# with slow streams has them for a while, not for a round.
_LONG_S = 30.0


class UploadQueue:
    """`slots` uploads at a time. Lives on one event loop; `clock` never runs backwards, seconds."""

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._clock = clock
        self._running = 0
        # By token: when each is to come back; those whose time has come; those that came back in time and found no
        # slot again. `_coming` is a heap over all of them, with entries that may be outdated.
        self._waiting: dict[str, float] = {}
        self._due: OrderedDict[str, float] = OrderedDict()
        self._again: set[str] = set()
        self._coming: list[tuple[float, str]] = []
        self._full_since = 0.0
        self._freed_at: deque[float] = deque(maxlen=_SAMPLES)

    @property
    def waiting_count(self) -> int:
        """Number of uploads that were told to come back and have not done so."""
        return len(self._waiting)

    def enter(self, token: str) -> None:
        """Take a slot. Raises `Exhausted`, with the time to wait, when none is free."""
        wait_s = self.wait_s(token)
        if wait_s:
            others = f" and {len(self._waiting) - 1} wait" if len(self._waiting) > 1 else ""
            why = f"{self._running} uploads are running{others}; try again in {wait_s:.3g} s"
            raise Exhausted(why, retry_after_s=wait_s)
        # Its reservation is used up, also where it came before its time and found a free slot.
        self.forget(token)
        self._running += 1
        if self._running == self._slots and not self._freed_at:
            self._full_since = self._clock()

    def leave(self) -> None:
        """Free a slot."""
        self._running -= 1
        if self._waiting:
            self._freed_at.append(self._clock())
        else:
            # Without a queue the rate measures demand, not capacity.
            self._freed_at.clear()

    def wait_s(self, token: str) -> float:
        """Return how long `token` must wait, seconds, and keep its reservation. 0: it may come now."""
        now = self._clock()
        self._advance(now)
        known = token in self._waiting
        # Slots of uploads whose time has come are theirs. A known token is one of these, or will be.
        if self._running + (0 if known else len(self._due)) < self._slots:
            return 0.0
        if known and (left_s := self._waiting[token] - now) > 0:
            return max(_SHORTEST_S, left_s)
        # Its time has come, and no slot is free: the estimate was too short. It goes behind those in the same
        # case, and before all whose time is still to come. A new token goes behind everybody.
        self.forget(token)
        before = len(self._again) + len(self._due) if known else len(self._waiting)
        wait_s = min(max((before + 1) * self._seconds_per_slot(now), _SHORTEST_S), _LONGEST_S)
        self._remember(token, now + wait_s, again=known)
        return wait_s

    def _seconds_per_slot(self, now: float) -> float:
        """Estimate the time until one more slot is free."""
        if len(self._freed_at) >= _LEAST_SAMPLES:
            # Until now, and not until the last one: while no slot becomes free the estimate grows.
            return _HASTE * (now - self._freed_at[0]) / len(self._freed_at)
        return max(_GUESS_S, now - self._full_since) / self._slots

    def _remember(self, token: str, at: float, again: bool) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            return
        self._waiting[token] = at
        if again:
            self._again.add(token)
        # A heap cannot remove: a token that was forgotten or delayed leaves an outdated entry behind.
        heapq.heappush(self._coming, (at, token))
        if len(self._coming) > 2 * _SAMPLES + 2 * len(self._waiting):
            # Built anew when over half is outdated. A sorted list is a heap.
            self._coming = sorted((at, token) for token, at in self._waiting.items() if token not in self._due)

    def _advance(self, now: float) -> None:
        """Mark tokens whose time has come as due, and drop those that are too late."""
        while self._coming and self._coming[0][0] <= now:
            at, token = heapq.heappop(self._coming)
            # Any other time is that of an outdated entry.
            if self._waiting.get(token) == at:
                self._due[token] = at
        while self._due and now - next(iter(self._due.values())) > _LATE_S:
            self.forget(next(iter(self._due)))

    def forget(self, token: str) -> None:
        """Drop the reservation of a token, if it has one."""
        self._waiting.pop(token, None)
        self._due.pop(token, None)
        self._again.discard(token)


class UploadStream:
    """Stream of an upload. A newer one, an upload that needs its slot, or the end of its task ends it.

    `closed_for`: why its task was closed. `told_at`: when its progress was last told.
    """

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.limit = asyncio.timeout(None)
        self.ended = asyncio.Event()
        self.gives_way = False
        self.closed_for: str | None = None
        self.told_at = -math.inf
        self._ending = False
        self._complete = False
        self._begun_at = time.monotonic()
        self._arrival: Arriving | None = None
        self._pace: UploadPace | None = None

    def give_way(self) -> None:
        """End it in favour of another upload."""
        self.gives_way = True
        self.end()

    def close(self, reason: str) -> None:
        """End it because no update of its task is wanted any more."""
        # Once all bytes are here the check of the update says how its stream ends.
        if not self._complete:
            self.closed_for = reason
            self.end()

    def complete(self) -> None:
        """Note that all bytes are here."""
        self._complete = True

    def end(self) -> None:
        """Let the block of its slot reach its limit. A handler that is cancelled would give no answer."""
        # Rescheduled twice, the limit would raise again while the first error is handled.
        if not self._ending:
            self._ending = True
            self.limit.reschedule(asyncio.get_running_loop().time())

    def carries(self, arrival: Arriving) -> None:
        """Measure the bytes of this upload from now on."""
        self._arrival = arrival
        self._pace = UploadPace.begun(arrival.size_bytes, arrival.manifest.size_bytes, self._begun_at)

    def bytes_per_second(self, now: float) -> float:
        """Return its recent rate; infinite while that is not known, and once all bytes are there."""
        if self._ending or self._complete or self._arrival is None or self._pace is None:
            return math.inf
        self._pace = self._pace.moved(self._arrival.size_bytes, now, _PACE_S)
        return math.inf if now - self._begun_at < _PACE_S else self._pace.bytes_per_second(now)

    def left_s(self, now: float) -> float:
        """Return the seconds it still needs at its pace, once it has had its turn; before that 0."""
        rate = self.bytes_per_second(now)
        if self._arrival is None or math.isinf(rate) or now - self._begun_at < _LONG_S:
            return 0.0
        left_bytes = self._arrival.manifest.size_bytes - self._arrival.size_bytes
        return left_bytes / rate if rate > 0 else math.inf


class UploadSlots:
    """The streams that run, one for each upload, and the queue of those that do not."""

    def __init__(self, slots: int) -> None:
        self._queue = UploadQueue(slots)
        self._streams: dict[str, UploadStream] = {}

    async def end_former(self, token: str, worker: str) -> None:
        """Let the newest stream of a worker's upload take over: the one before is most likely a dead connection.

        Returns once no stream of this upload runs.
        """
        # In a loop: while this one waits, a third stream of the same upload may take the place of the former.
        while (former := self._streams.get(token)) is not None and former.worker == worker:
            former.end()
            await former.ended.wait()

    @asynccontextmanager
    async def slot(self, token: str, worker: str) -> AsyncIterator[UploadStream]:
        """Take a slot for the block. No other stream of this upload may run.

        Raises `Exhausted` when no slot is free or others need this one, `LinkError` when a newer stream has taken
        over, and `RoundClosed` when the task is closed.
        """
        try:
            self._queue.enter(token)
        except Exhausted:
            # Not for this upload, which waits for its time: for the next that comes.
            self._free_a_slot()
            raise
        self._streams[token] = stream = UploadStream(worker)
        try:
            async with stream.limit:
                yield stream
        except TimeoutError:
            if stream.closed_for is not None:
                raise RoundClosed(stream.closed_for) from None
            if stream.gives_way:
                why = "others wait, and this upload is slow or still needs long; go on later"
                raise Exhausted(why, retry_after_s=_PACE_S) from None
            raise LinkError("a newer stream of this update has taken over") from None
        finally:
            # The slot is free before a waiting stream of the same upload continues.
            del self._streams[token]
            self._queue.leave()
            stream.ended.set()

    def wait_s(self, token: str) -> float:
        """Return how long an upload must wait for a slot, seconds, and keep its reservation."""
        # A stream that runs is one of this upload's own: the next takes over from it.
        wait_s = 0.0 if token in self._streams else self._queue.wait_s(token)
        if wait_s:
            self._free_a_slot()
        return wait_s

    def close(self, token: str, reason: str) -> None:
        """End the stream and the reservation of a task that is closed."""
        self._queue.forget(token)
        if (stream := self._streams.get(token)) is not None:
            stream.close(reason)

    def _free_a_slot(self) -> None:
        """End a stream that hardly uses its slot, else one that needs long: another upload waits."""
        now = time.monotonic()
        slowest = min(self._streams.values(), key=lambda stream: stream.bytes_per_second(now), default=None)
        if slowest is not None and slowest.bytes_per_second(now) < _LEAST_BYTES_PER_S:
            slowest.give_way()
            return
        longest = max(self._streams.values(), key=lambda stream: stream.left_s(now), default=None)
        if longest is not None and longest.left_s(now) > _PACE_S:
            longest.give_way()

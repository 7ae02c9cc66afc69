"""Upload queue: a bounded number of slots, and reserved times for the uploads that found none free.

The rule: no upload waits on an open stream. An upload without a slot is refused with a delay: by then those before
it have been served, at the rate at which slots become free. Once the delay is over a slot stays reserved for it,
for `_LATE_S`; after that anybody may take it.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from fedgrpc.errors import Exhausted

_SAMPLES: Final = 64
_LEAST_SAMPLES: Final = 8
# The observed rate is limited by how fast uploads come back. Answering with it unchanged would slow them further.
_HASTE: Final = 0.8
# Assumed time an upload holds its slot, until one has left its slot.
_GUESS_S: Final = 0.25
_SHORTEST_S: Final = 0.05
# Estimates err, so a long wait is cut into several.
_LONGEST_S: Final = 300.0
# How long after its time a slot stays reserved for an upload.
_LATE_S: Final = 2.0
_MAX_WAITING: Final = 100_000


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
        if self._running + (0 if known else len(self._due)) < self._slots:
            return 0.0
        if known and (left_s := self._waiting[token] - now) > 0:
            return max(_SHORTEST_S, left_s)
        self.forget(token)
        before = len(self._again) + len(self._due) if known else len(self._waiting)
        wait_s = min(max((before + 1) * self._seconds_per_slot(now), _SHORTEST_S), _LONGEST_S)
        self._remember(token, now + wait_s, again=known)
        return wait_s

    def _seconds_per_slot(self, now: float) -> float:
        """Estimate the time until one more slot is free."""
        if len(self._freed_at) >= _LEAST_SAMPLES:
            return _HASTE * (now - self._freed_at[0]) / len(self._freed_at)
        return max(_GUESS_S, now - self._full_since) / self._slots

    def _remember(self, token: str, at: float, again: bool) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            return
        self._waiting[token] = at
        if again:
            self._again.add(token)
        heapq.heappush(self._coming, (at, token))
        if len(self._coming) > 2 * _SAMPLES + 2 * len(self._waiting):
            self._coming = sorted((at, token) for token, at in self._waiting.items() if token not in self._due)

    def _advance(self, now: float) -> None:
        """Mark tokens whose time has come as due, and drop those that are too late."""
        while self._coming and self._coming[0][0] <= now:
            at, token = heapq.heappop(self._coming)
            if self._waiting.get(token) == at:
                self._due[token] = at
        while self._due and now - next(iter(self._due.values())) > _LATE_S:
            self.forget(next(iter(self._due)))

    def forget(self, token: str) -> None:
        """Drop the reservation of a token, if it has one."""
        self._waiting.pop(token, None)
        self._due.pop(token, None)
        self._again.discard(token)

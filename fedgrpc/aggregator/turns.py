"""Places for uploads, and the order of those who found none.

The rule: nobody waits on an open stream. Who finds no place is told when to come back: once those who came before
it have been served, at the rate at which places become free. A place is kept for one whose time has come, for as
long as it may be late; then it is anybody's.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from typing import Final

from fedgrpc.errors import Exhausted

_SAMPLES: Final = 64
_LEAST_SAMPLES: Final = 8
# Places are never left faster than others come for them: told exactly that, they would come ever slower.
_HASTE: Final = 0.8
# How long an upload is thought to hold its place as long as none has left one.
_GUESS_S: Final = 0.25
_SHORTEST_S: Final = 0.05
# Estimates err: one who waits for very long asks now and then.
_LONGEST_S: Final = 300.0
# How late one may be that was told a time.
_LATE_S: Final = 2.0
_MAX_WAITING: Final = 100_000


class Turns:
    """`places` uploads at a time. Lives on one event loop; `clock` never runs backwards, seconds."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._clock = clock
        self._running = 0
        # When each is to come; those whose time has come; those who came in time, and found no place again; and a
        # heap of all, that may hold what is no longer so.
        self._waiting: dict[str, float] = {}
        self._due: OrderedDict[str, float] = OrderedDict()
        self._again: set[str] = set()
        self._coming: list[tuple[float, str]] = []
        self._full_since = 0.0
        self._freed_at: deque[float] = deque(maxlen=_SAMPLES)

    @property
    def waiting_count(self) -> int:
        """How many were told to come back, and have not come."""
        return len(self._waiting)

    def enter(self, token: str) -> None:
        """Take a place, to be left again. Raises `Exhausted`, which says when to come back, where none is free."""
        wait_s = self.wait_s(token)
        if wait_s:
            others = f" and {len(self._waiting) - 1} wait" if len(self._waiting) > 1 else ""
            why = f"{self._running} uploads are running{others}; try again in {wait_s:.3g} s"
            raise Exhausted(why, retry_after_s=wait_s)
        self._forget(token)
        self._running += 1
        if self._running == self._places and not self._freed_at:
            self._full_since = self._clock()

    def keep_only(self, tokens: Container[str]) -> None:
        """Nobody else has a turn any more."""
        for token in [token for token in self._waiting if token not in tokens]:
            self._forget(token)

    def leave(self) -> None:
        """A place is free."""
        self._running -= 1
        if self._waiting:
            self._freed_at.append(self._clock())
        else:
            # How often places are left that nobody waits for says nothing of how often they can be.
            self._freed_at.clear()

    def wait_s(self, token: str) -> float:
        """How long `token` is to wait before it comes, seconds; its turn is kept. 0: it may come now."""
        now = self._clock()
        self._advance(now)
        known = token in self._waiting
        if self._running + (0 if known else len(self._due)) < self._places:
            return 0.0
        if known and (left_s := self._waiting[token] - now) > 0:
            return max(_SHORTEST_S, left_s)
        self._forget(token)
        before = len(self._again) + len(self._due) if known else len(self._waiting)
        wait_s = min(max((before + 1) * self._seconds_a_place(now), _SHORTEST_S), _LONGEST_S)
        self._remember(token, now + wait_s, again=known)
        return wait_s

    def _seconds_a_place(self, now: float) -> float:
        """How long it takes until one more place is free."""
        if len(self._freed_at) >= _LEAST_SAMPLES:
            return _HASTE * (now - self._freed_at[0]) / len(self._freed_at)
        return max(_GUESS_S, now - self._full_since) / self._places

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
        """Whose time has come is due; who is too late has no turn any more."""
        while self._coming and self._coming[0][0] <= now:
            at, token = heapq.heappop(self._coming)
            if self._waiting.get(token) == at:
                self._due[token] = at
        while self._due and now - next(iter(self._due.values())) > _LATE_S:
            self._forget(next(iter(self._due)))

    def _forget(self, token: str) -> None:
        self._waiting.pop(token, None)
        self._due.pop(token, None)
        self._again.discard(token)

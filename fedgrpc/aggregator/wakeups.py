"""Waking the open polls of many workers, a few at a time.

A thousand polls answered in one go are followed by a thousand downloads, and any other call meanwhile waits for
all of them. So the next few are woken when the event loop has caught up with those before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

_AT_ONCE: Final = 16
# However many there are, all of them are told in not many more steps than this.
_STEPS: Final = 64
_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1
# After each step, so many times as long for everything else as the loop was late.
_REST: Final = 2.0


class PacedWakeups:
    """Sets events in the order in which they were given. Lives on one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Event] = deque()
        self._next: asyncio.TimerHandle | None = None

    def wake(self, event: asyncio.Event) -> None:
        """Set the event soon: at once when it is one of a few."""
        if self._next is None:
            self._schedule(0.0)
        self._waiting.append(event)

    def _schedule(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(pause_s, self._step, loop.time() + pause_s)

    def _step(self, due: float) -> None:
        """Set the next few, and rest the longer the later the loop is."""
        for _ in range(min(len(self._waiting), max(_AT_ONCE, len(self._waiting) // _STEPS))):
            self._waiting.popleft().set()
        late_s = asyncio.get_running_loop().time() - due
        self._next = None
        if self._waiting:
            self._schedule(min(max(_PAUSE_S, _REST * late_s), _LONGEST_PAUSE_S))

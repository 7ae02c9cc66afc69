"""A bound on the bytes of updates that are in memory at once, shared by all uploads."""

from __future__ import annotations

import asyncio
from collections import deque


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
        """What is handed out now."""
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
        """They are free again; negative: that much more is held than was asked for."""
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

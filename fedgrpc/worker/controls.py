"""What the owner has told the worker: to pause, to drain. The loop looks at it between tasks and while waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Controls:
    """Two flags and a way to wait for a change of them."""

    def __init__(self) -> None:
        self.paused = False
        self.draining = False
        self._changed = asyncio.Event()

    def pause(self) -> None:
        """Take no further task."""
        self.paused = True
        self._wake()

    def resume(self) -> None:
        """Take tasks again."""
        self.paused = False
        self._wake()

    def drain(self) -> None:
        """Finish the task in hand, then end."""
        self.draining = True
        self._wake()

    def changed(self) -> Coroutine[Any, Any, str]:
        """Awaitable that ends when a flag is set or cleared after this call (not: after it is awaited)."""
        return _set(self._changed)

    async def wait(self, timeout_s: float) -> None:
        """Wait for `timeout_s`, or less when the worker is to drain."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.draining:
                    await self.changed()
        except TimeoutError:
            return

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _set(event: asyncio.Event) -> str:
    await event.wait()
    return "steered"

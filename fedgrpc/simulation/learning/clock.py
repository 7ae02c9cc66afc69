"""An event loop whose time is virtual: it jumps to the next timer when there is nothing to do.

The rule: what runs on it sees one order of events, whatever the machine does meanwhile. So blocking calls run
inline, as if they took no time, and no file descriptor is waited for.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context
from typing import Any

from fedgrpc.errors import FedgrpcError


class _Clock(selectors.DefaultSelector):
    """Waits by moving `now` on."""

    def __init__(self, now: float) -> None:
        super().__init__()
        self.now = now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let the time pass; nothing is ever ready."""
        if timeout is None:
            raise FedgrpcError("the simulation stands still: nobody waits for a time, or has anything to do")
        if timeout > 0:
            self.now += timeout
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Event loop that begins at `started_at`, virtual seconds. Run it with `run_until_complete`, and close it."""

    def __init__(self, started_at: float = 0.0) -> None:
        self._virtual = _Clock(started_at)
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return the virtual time, seconds."""
        return self._virtual.now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call it at that time, and not a moment before."""
        return super().call_at(when, self._reached, when, callback, *args, context=context)

    def _reached(self, when: float, callback: Callable[..., Any], *args: Any) -> None:
        # asyncio calls what is due within a nanosecond. Two that each wait for the rest of it, which is no time at
        # all, would then keep each other ready, and the clock would stand still.
        self._virtual.now = max(self._virtual.now, when)
        callback(*args)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Call `func` now: a thread would come back at a moment that differs from run to run."""
        future: asyncio.Future[Any] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(error)
        return future

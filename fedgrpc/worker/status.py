"""Status that a worker publishes to its owner, and the owner's controls.

The status is one immutable value, replaced on every change, with any number of watchers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from fedgrpc.aio import Changes
from fedgrpc.protocol.devices import Activity, Status

_MIN_INTERVAL_S: Final = 0.25


class StatusPublisher:
    """Holds the present status and notifies its watchers. Only the worker's loop writes it."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self._changes = Changes()
        self._activities = Changes()

    def show(self, **changes: Any) -> None:
        """Replace fields of the status, and wake watchers if that changes it."""
        if all(getattr(self.status, name) == value for name, value in changes.items()):
            return
        self.status = replace(self.status, **changes)
        self._changes.notify()

    def enter(self, activity: Activity) -> None:
        """Start an activity, with its progress at zero."""
        self.show(activity=activity, progress=0.0)
        self._activities.notify()

    async def next_activity(self, timeout_s: float) -> None:
        """Return when the next activity starts, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._activities.wait(self._activities.revision)

    async def watch(self, min_interval_s: float = _MIN_INTERVAL_S) -> AsyncIterator[Status]:
        """Yield the present status, then each that follows; of those in quick succession only the last."""
        while True:
            seen = self._changes.revision
            yield self.status
            await asyncio.sleep(min_interval_s)
            await self._changes.wait(seen)


class Controls:
    """The owner's instructions: to pause, to drain. The loop looks at them between tasks and while it waits."""

    def __init__(self) -> None:
        self.paused = False
        self.draining = False
        self._changes = Changes()

    def pause(self) -> None:
        """Take no further task."""
        self.paused = True
        self._changes.notify()

    def resume(self) -> None:
        """Take tasks again."""
        self.paused = False
        self._changes.notify()

    def drain(self) -> None:
        """Finish the present task, then end."""
        self.draining = True
        self._changes.notify()

    def changed(self) -> Coroutine[Any, Any, int]:
        """Return an awaitable of the next change after this call (not: after it is awaited)."""
        return self._changes.wait(self._changes.revision)

    async def wait(self, timeout_s: float) -> None:
        """Wait for `timeout_s`, or less when the worker is to drain."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.draining:
                    await self.changed()

"""Blocking work on the items of a stream, off the event loop, in order.

A hop to a thread costs about as much as the work on a chunk. So while one batch is in the thread the next one
gathers, and a stream that is read faster than it is worked on waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(Generic[T]):
    """A context manager. `put` items, then `drain`; what `work` raises is raised by the next of these.

    `work` gets each batch in a thread; `done`, on the event loop, the batch that is worked on or given up. At most
    `max_waiting` items wait for the batch in hand. On leaving, no thread is working any more: what has been put
    is worked on even when an error ends the block, and given up when it is cancelled.
    """

    def __init__(
        self,
        work: Callable[[list[T]], None],
        *,
        max_waiting: int = 2,
        done: Callable[[list[T]], None] = lambda batch: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._work = work
        self._max_waiting = max_waiting
        self._done = done
        self._failed = failed
        self._waiting: list[T] = []
        self._batch: list[T] = []
        self._running: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    async def __aenter__(self) -> Lane[T]:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._give_up()
        while self._running is not None:
            # A thread cannot be cancelled: whoever waits for it waits for it, then hears of the cancellation.
            await _uninterrupted(self._running)

    async def put(self, item: T) -> None:
        """Hand over one item; wait while too many are there. Raises what `work` raised for an earlier one."""
        self._waiting.append(item)
        self._start()
        while self._running is not None and len(self._waiting) > self._max_waiting:
            await asyncio.wait([self._running])
        self._raise()

    async def drain(self) -> None:
        """Wait until all items are worked on. Raises what `work` raised."""
        while self._running is not None:
            await asyncio.wait([self._running])
        self._raise()

    def _start(self) -> None:
        if self._running is not None or not self._waiting or self._error is not None:
            return
        self._batch, self._waiting = self._waiting, []
        self._running = asyncio.get_running_loop().run_in_executor(None, self._work, self._batch)
        self._running.add_done_callback(self._end)

    def _end(self, finished: asyncio.Future[None]) -> None:
        self._running = None
        batch, self._batch = self._batch, []
        self._done(batch)
        self._error = finished.exception()
        if self._error is not None:
            self._give_up()
            self._failed()
        self._start()

    def _give_up(self) -> None:
        """Nothing that waits will be worked on."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._done(waiting)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


async def _uninterrupted(future: asyncio.Future[None]) -> None:
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    await asyncio.sleep(0)
    if cancelled is not None:
        raise cancelled

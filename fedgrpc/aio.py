"""Waiting and background work that the aggregator and the worker share.

    Changes                 a change notification for any number of watchers
    BatchPipeline           blocking work on the items of a stream, in threads, in order
    to_its_end              work that outlives the cancellation of who waits for it
    prefetched              the items of a blocking iterator, read ahead in a thread
    run_until_interrupted   a coroutine that another one can end
    in_thread               a blocking call in a thread of its own, with a stop flag
    BackgroundThread        calls from blocking code, in order, while the caller continues

The rule: nothing outlives its block. Each returns or raises after the tasks and threads it started have ended. A
thread that ignores its stop flag is the only exception, and only `in_thread` leaves it behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

# One call runs and one waits, so that the thread never idles and little is in memory.
_MAX_PENDING: Final = 2


class Changes:
    """Change notification for any number of watchers; `revision` counts the changes."""

    def __init__(self) -> None:
        self.revision = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Wake every watcher."""
        self.revision += 1
        changed, self._next = self._next, asyncio.Event()
        changed.set()

    async def wait(self, seen: int) -> int:
        """Return the present revision once it is not `seen`."""
        if self.revision == seen:
            await self._next.wait()
        return self.revision


class BatchPipeline(Generic[T]):
    """Blocking work on the items of a stream, off the event loop, in order. A context manager.

    A hop to a thread costs about as much as the work on one chunk. So items that arrive while a batch is in the
    thread form the next batch. A stream that is read faster than it is worked on waits in `put`.

    `work` gets each batch in a thread. `done` gets the same batch on the event loop, once it is worked on or
    given up. `failed` is called when `work` raises. At most `max_waiting` items wait for the batch in the thread.
    When the block ends no thread is working. An error in the block lets the items that were put be worked on, a
    cancellation gives them up.
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

    async def __aenter__(self) -> BatchPipeline[T]:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._give_up()
        while self._running is not None:
            # A thread cannot be cancelled. Wait for its end first, then raise the cancellation.
            await _uninterrupted(self._running)

    async def put(self, item: T) -> None:
        """Hand over one item; wait while too many are waiting. Raises what `work` raised for an earlier item."""
        self.add(item)
        while self._running is not None and len(self._waiting) > self._max_waiting:
            await asyncio.wait([self._running])
        self._raise()

    def add(self, item: T) -> None:
        """Hand over one item, however many are waiting. After an error it is given up."""
        if self._error is not None:
            return self._done([item])
        self._waiting.append(item)
        self._start()

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
        """Drop the waiting items without work."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._done(waiting)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


async def _uninterrupted(future: asyncio.Future[None]) -> None:
    cancelled = await until_done(future)
    # Let the callbacks of the future run first.
    await asyncio.sleep(0)
    if cancelled is not None:
        raise cancelled


async def until_done(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Return once the future is done, however often this is cancelled; returns the last cancellation."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. A cancellation is raised only once the work has ended, and its own error is then dropped."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await until_done(task)
        if not task.cancelled():
            # Retrieve it: asyncio logs exceptions that are never retrieved.
            task.exception()
        raise


async def prefetched(read: Callable[[], tuple[list[T], bool]]) -> AsyncGenerator[T]:
    """Yield the items of batches, each read in a thread while those of the batch before are used.

    `read()` returns the next batch, and whether another one may follow. Close the generator
    (`contextlib.aclosing`) before what it reads from.
    """
    loop = asyncio.get_running_loop()
    coming = loop.run_in_executor(None, read)
    more = True
    try:
        while more:
            batch, more = await coming
            if more:
                coming = loop.run_in_executor(None, read)
            for item in batch:
                yield item
    finally:
        # The file must not be closed under the thread that reads it.
        await asyncio.wait([coming])


class Interrupted(Exception):
    """The interrupter ended first; its result is the reason."""


async def run_until_interrupted(work: Coroutine[Any, Any, T], interrupter: Coroutine[Any, Any, object]) -> T:
    """Await `work`; raise `Interrupted(reason)` when `interrupter` returns a reason first.

    What either raises is raised. Both have ended when this returns or raises.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(interrupter)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Interrupted(watching.result())
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def in_thread(work: Callable[[], T], stop: threading.Event) -> T:
    """Run `work` in a thread of its own and await it.

    A cancellation sets `stop` and waits for the thread to end, so that two never overlap. A second cancellation
    leaves the thread behind. The thread is a daemon: user code that hangs cannot keep the process alive.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again where the thread is awaited
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="fedgrpc-training", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([done])
        # Retrieve the exception of a stopped thread: asyncio logs exceptions that are never retrieved.
        done.exception()
        raise


class BackgroundThread(Generic[T]):
    """One thread for calls in order, while the caller continues. A context manager.

    For blocking code. What a call raises is raised by the next method that waits for it.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: deque[Future[T]] = deque()

    def __enter__(self) -> BackgroundThread[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def submit(self, call: Callable[..., T], *args: object) -> None:
        """Queue a call, once there is room. Results that nobody takes from `make_room` are dropped."""
        for _ in self.make_room():
            pass
        self._pending.append(self._executor.submit(call, *args))

    def make_room(self) -> Iterator[T]:
        """Wait until another call may be queued; yield the results of the calls that end meanwhile, in order."""
        while len(self._pending) >= _MAX_PENDING:
            yield self._pending.popleft().result()

    def wait(self) -> None:
        """Wait for all pending calls."""
        for _ in self.results():
            pass

    def results(self) -> Iterator[T]:
        """Yield the results of all pending calls, in order."""
        while self._pending:
            yield self._pending.popleft().result()

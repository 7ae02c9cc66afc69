"""Things that run for the length of a block, in two forms: `async with`, and `with`.

The rule: there is one implementation, which is asynchronous. A blocking form hands its calls to an event loop in a
thread, which all blocking forms of a process share. It so works beside a loop that runs already, as in a notebook.
"""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar, cast

import structlog

from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.logging import configure_own

Own = TypeVar("Own")
Running = TypeVar("Running")
Blocking = TypeVar("Blocking")
P = ParamSpec("P")
T = TypeVar("T")


class LoopThread:
    """An event loop in a thread: `acquire` starts it, and the last `release` ends it."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[LoopThread | None] = None

    def __init__(self) -> None:
        self._users = 0
        # What `Block.start` began, which nobody else need hold.
        self.started: set[Block[Any, Any]] = set()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fedgrpc", daemon=True)
        self._thread.start()
        self._loop = self._started.result()

    def _run(self) -> None:
        async def main() -> None:
            self._started.set_result(asyncio.get_running_loop())
            await self._end.wait()

        asyncio.run(main())

    @classmethod
    def acquire(cls) -> LoopThread:
        """Return the loop of this process, to be released once."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = LoopThread()
                # What nobody has ended is cancelled before the interpreter takes its modules apart.
                atexit.register(cls._shared._close)
            cls._shared._users += 1
            return cls._shared

    def release(self) -> None:
        """Give the loop back."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            type(self)._shared = None
        atexit.unregister(self._close)
        self._close()

    def _close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, and return what it returns. Ctrl-C cancels it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise UsageError("a blocking call within an event loop of fedgrpc: use `async with` there")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class Handle(Generic[Own]):
    """The blocking form of something that runs."""

    def __init__(self, own: Own, loop: LoopThread, block: Block[Any, Any]) -> None:
        """`own` runs in `loop` until `block` is left."""
        self.own = own
        self._loop = loop
        self._block = block

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where it runs, and return what it returns."""
        return self._loop.call(work)

    def close(self) -> None:
        """End what `start` began; a second call does nothing."""
        self._block.end()


def blocking(
    method: Callable[Concatenate[Own, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Handle[Own], P], T]:
    """Return the blocking form of a method, for the class of a `Handle`."""

    @wraps(method)
    def call(handle: Handle[Own], *args: P.args, **kwargs: P.kwargs) -> T:
        return handle.call(method(handle.own, *args, **kwargs))

    return cast(Callable[Concatenate[Handle[Own], P], T], call)


class Block(ABC, Generic[Running, Blocking]):
    """Something that runs for the length of a block: once at a time."""

    _manager: AbstractAsyncContextManager[Running] | None = None
    _thread: LoopThread | None = None

    @abstractmethod
    def _opened(self) -> AbstractAsyncContextManager[Running]:
        """Return a context manager that runs it."""

    @abstractmethod
    def _handle(self, running: Running, loop: LoopThread) -> Blocking:
        """Return its blocking form."""

    def start(self) -> Blocking:
        """Begin the blocking form where a `with` does not fit, as in a notebook; its `close()` ends it."""
        handle = self.__enter__()
        assert self._thread is not None
        self._thread.started.add(self)
        return handle

    def end(self) -> None:
        """End the blocking form, if it runs."""
        if self._thread is not None:
            self.__exit__(None, None, None)

    async def end_by_itself(self) -> None:
        """End what `start` began, in its loop: what it did is done. Otherwise nothing happens."""
        thread = self._thread
        if thread is None or self not in thread.started:
            return
        self._thread = None
        thread.started.discard(self)
        with suppress(FedgrpcError):
            await self.__aexit__(None, None, None)
        thread.release()

    async def __aenter__(self) -> Running:
        if self._manager is not None:
            raise UsageError(f"this {type(self).__name__} is open already")
        self._manager = self._opened()
        try:
            return await self._manager.__aenter__()
        except BaseException:
            # Cancelled, too: it was not opened, and may be opened again.
            self._manager = None
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            await manager.__aexit__(kind, error, trace)

    def __enter__(self) -> Blocking:
        loop = LoopThread.acquire()
        try:
            running = loop.call(self.__aenter__())
        except BaseException:
            # Ctrl-C, too: there will be no `__exit__`.
            loop.release()
            raise
        self._thread = loop
        return self._handle(running, loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop, self._thread = self._thread, None
        if loop is None:
            return
        loop.started.discard(self)
        try:
            loop.call(self.__aexit__(kind, error, trace))
        finally:
            loop.release()


def log_quietly(level: str | None = None) -> None:
    """Let fedgrpc log from `level` up; without, warnings, unless the program has configured structlog itself."""
    if level is not None or not structlog.is_configured():
        configure_own(level or "warning")


def folder_of(owner: object, prefix: str) -> Path:
    """Make a folder that is removed with its owner."""
    folder = tempfile.mkdtemp(prefix=prefix)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)

"""Two ways to run work that can be interrupted: a coroutine with an interrupter, and a thread with a stop flag."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """The interrupter ended first; its result is the reason."""


async def unless(work: Coroutine[Any, Any, T], interrupter: Coroutine[Any, Any, str]) -> T:
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

    When cancelled, it sets `stop` and waits for the thread to end, so that two never overlap; cancelled again, it
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
        # Nobody asks what a stopped thread raised; unasked, asyncio would complain.
        done.exception()
        raise

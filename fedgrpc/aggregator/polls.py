"""One poll of a worker: it waits for work, and ends when there is some, its time is over, or it is challenged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fedgrpc.aggregator.registry import Worker, WorkerRegistry

T = TypeVar("T")


async def polled(
    fleet: WorkerRegistry,
    worker: Worker,
    wait_s: float,
    clock: Callable[[], float],
    work: Callable[[], T | None],
    over: Callable[[], bool],
    begun: Callable[[], object],
) -> T | None:
    """Return what `work` finds, asked now and whenever the worker is woken; None after `wait_s` or when `over`.

    `begun` is called once the worker counts as idle.
    """
    limit = asyncio.timeout(wait_s)
    with fleet.polling(worker, limit):
        begun()
        try:
            async with limit:
                # A poll that is challenged ends, for the caller to show that it is alive.
                while not (over() or worker.holder.challenge):
                    worker.woken.clear()
                    if (found := work()) is not None:
                        return found
                    await worker.woken.wait()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            worker.holder.hung_up = worker.polls == 1
            raise
        finally:
            worker.last_seen = clock()
    return None

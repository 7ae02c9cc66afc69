"""Common part of all calls of a worker: its name, their metadata, their limits in time, and the guard of a stream.

Each call is short or resumable, and stands alone: nothing here retries. Streams have no total time limit, since a
slow link may need hours. A stream that moves no byte for `stall_s` ends with a `LinkError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.worker.task_stream import Metadata

CALL_S: Final = 20.0
# A call that waits for news gets this much beyond its wait.
WAIT_MARGIN_S: Final = 15.0
_MAX_REASON_CHARS: Final = 500

# Takes how much of a payload has moved, 0 to 1.
Report = Callable[[float], None]
# Called when bytes moved, with the seconds that the stream then waits of its own accord.
Moved = Callable[[float], None]


@dataclass
class Caller:
    """A worker as its calls name it. `metadata` changes with its task; only `AggregatorClient` writes to it."""

    worker: str
    metadata: Metadata
    stall_s: float

    @asynccontextmanager
    async def stall_guard(self) -> AsyncIterator[Moved]:
        """Raise `LinkError` when the yielded function is not called for `stall_s` plus its last argument.

        Keepalive finds dead links. This finds a live peer that hangs.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.stall_s) as limit:
                yield lambda waiting_s: limit.reschedule(loop.time() + waiting_s + self.stall_s)
        except TimeoutError as error:
            raise LinkError(f"no byte moved for {self.stall_s:g} s") from error


@asynccontextmanager
async def cancelled_on_exit(call: Any) -> AsyncIterator[Any]:
    """End the stream on the other side too, for whatever reason the block is left."""
    try:
        yield call
    finally:
        call.cancel()


def one_line(reason: str) -> str:
    """Return a reason as one line for an operator, not too long for a message."""
    return " ".join(reason.split())[:_MAX_REASON_CHARS]


def told_reason(error: FedgrpcError, without_metrics: bool) -> str:
    """Return what the aggregator is told of a failure: its kind alone where the text may tell of data."""
    return f"{type(error).__name__}: see the log of the device" if without_metrics else str(error)


def ignore(progress: float) -> None:
    """Report to nobody."""

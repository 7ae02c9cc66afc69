"""Messages of a server's streams, and the status behind them.

The rule: gRPC refuses the status of a call as long as one of its messages is on the way, also where nobody waits
for that message any more. The caller would wait forever.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn

import grpc
import grpc.aio

# A caller that reads nothing for so long gets no status either.
_TAKEN_WITHIN_S: Final = 10.0


async def send(context: Any, message: Any) -> None:
    """Send a message, and wait until the caller's connection has taken it.

    Cancelled, it still waits for that, for ten seconds at most.
    """
    taken = asyncio.ensure_future(context.write(message))
    try:
        await asyncio.shield(taken)
    except asyncio.CancelledError:
        # Where the caller has gone the message fails, and asyncio would log that nobody asked how it ended.
        taken.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait([taken], timeout=_TAKEN_WITHIN_S)
        raise


async def abort(
    context: Any, code: grpc.StatusCode, text: str, metadata: tuple[tuple[str, str | bytes], ...]
) -> NoReturn:
    """End the call with this status. Raises `grpc.aio.AbortError`, or `CancelledError` where none can be sent."""
    try:
        await context.abort(code, text, trailing_metadata=metadata)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("an aborted call goes no further")

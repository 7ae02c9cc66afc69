"""A client-streaming call that always ends with what the server answered.

When a server answers before the client has finished writing (the round is closed, the chunk is at the wrong
offset), grpc.aio's next write fails and sets the status to "INTERNAL: Internal error from Core", also where the
server's own had come before (https://github.com/grpc/grpc/issues/36066; measured here with grpcio 1.85: up to
every call). So the status is noted at the moment when it arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import grpc
import grpc.aio

_CORE_DETAILS: Final = "Internal error from Core"


class ClientStream:
    """Write messages, then `finish`. The call must not have been written to before."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._answer: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def write(self, message: Any) -> bool:
        """Send one message; False once the server has answered and wants no more of them."""
        try:
            await self._call.write(message)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return False
        return True

    async def finish(self) -> Any:
        """No more messages; the response once the server has answered OK (None: OK, but its response is lost).

        Raises:
            grpc.aio.AioRpcError: its answer is an error, or it can give none.
        """
        try:
            await self._call.done_writing()
            return await self._call
        except grpc.aio.AioRpcError as error:
            # Either the write failed first, and the server's status has replaced its own by now, or the
            # status came first, was noted, and then replaced.
            answer = self._answer if error.details() == _CORE_DETAILS and self._answer is not None else error
            if answer.code() is not grpc.StatusCode.OK:
                raise answer from None
            return None

    def _note(self, call: Any) -> None:
        """Called when the first status is set."""
        code, details = _now(call.code()), _now(call.details())
        if details != _CORE_DETAILS:
            metadata = _now(call.trailing_metadata())
            self._answer = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details)


def _now(value: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for: a call's status, once it is set."""
    try:
        value.send(None)
    except StopIteration as stop:
        return stop.value
    value.close()
    raise RuntimeError("the status of a finished call was not at hand")

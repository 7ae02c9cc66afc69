"""A call that streams messages and always ends with the server's own answer.

A server may answer before the client has finished writing: the round is closed, or a chunk is at the wrong offset.
The next write of grpc.aio then fails and sets the status to "INTERNAL: Internal error from Core", even if the
server's own status has arrived (https://github.com/grpc/grpc/issues/36066; with grpcio 1.85 in up to every call).
So this class keeps the status as soon as it arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import grpc
import grpc.aio

_CORE_DETAILS: Final = "Internal error from Core"


class ClientStream:
    """Writes messages to a call, then finishes it. It is the call's only writer."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._answer: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def write(self, message: Any) -> bool:
        """Send one message. Return False once the server has answered and takes no more."""
        try:
            await self.call.write(message)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return False
        return True

    async def finish(self) -> Any:
        """End the messages and return the response. None: the server answered OK, but its response is lost.

        Raises:
            grpc.aio.AioRpcError: the server answered an error, or not at all.
        """
        try:
            await self.call.done_writing()
            return await self.call
        except grpc.aio.AioRpcError as error:
            answer = self._own(error)
            if answer.code() is not grpc.StatusCode.OK:
                raise answer from None
            return None

    async def read(self) -> Any:
        """Return the next response of a call that streams them; `grpc.aio.EOF` behind the last.

        Raises:
            grpc.aio.AioRpcError: the server answered an error, or not at all.
        """
        try:
            return await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise self._own(error) from None

    def _own(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the server's own status in place of one of Core."""
        # If the write failed first, the server's status has replaced the one of Core by now. If the server's came
        # first, Core's has replaced it, and `_answer` has it.
        return self._answer if error.details() == _CORE_DETAILS and self._answer is not None else error

    def _note(self, call: Any) -> None:
        """Keep the first status that the call gets."""
        code, details = _now(call.code()), _now(call.details())
        if details != _CORE_DETAILS:
            metadata = _now(call.trailing_metadata())
            self._answer = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details)


def _now(value: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that has nothing to wait for: a call's status, once it is set."""
    try:
        value.send(None)
    except StopIteration as stop:
        return stop.value
    value.close()
    raise RuntimeError("the status of a finished call was not at hand")

"""The worker's polls, one after the other over one call that stays open while tasks are carried out.

The rule: a stream serves as long as each poll has its answer. A poll that is given up or fails ends its stream,
and the next poll opens another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from fedgrpc.errors import LinkError
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1.aggregator_pb2 import PollTaskRequest, PollTaskResponse, PollTasksRequest, PollTasksResponse

# A server with TLS asks connections to end after an hour and cuts what is still open an hour later.
_RENEWED_AFTER_S: Final = 1800.0

Metadata = tuple[tuple[str, str], ...]


class TaskStream:
    """Polls over the open call of `PollTasks`. One poll at a time."""

    def __init__(
        self, open_call: Callable[..., Any], metadata: Metadata, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`open_call` is the stub's `PollTasks`."""
        self._open_call = open_call
        self._metadata = metadata
        self._clock = clock
        self._stream: ClientStream | None = None
        self._opened_at = 0.0

    async def poll(self, request: PollTaskRequest, timeout_s: float) -> PollTaskResponse:
        """Send a poll and return its answer. Raises as `PollTask`, and `LinkError` without an answer in time."""
        stream, self._stream = self._usable_stream(), None
        answered = False
        try:
            with domain_errors():
                async with asyncio.timeout(timeout_s):
                    response = await _answer(stream, request)
            answered = True
        except TimeoutError:
            raise LinkError(f"a poll had no answer for {timeout_s:g} s") from None
        finally:
            if not answered:
                stream.call.cancel()
        self._stream = stream
        return response

    def close(self) -> None:
        """End the open call, if there is one. A later poll opens another."""
        if self._stream is not None:
            self._stream.call.cancel()
            self._stream = None

    def _usable_stream(self) -> ClientStream:
        """Return the open call, or a new one where that has ended or is old."""
        if self._clock() - self._opened_at > _RENEWED_AFTER_S:
            self.close()
        if self._stream is None or self._stream.call.done():
            self._stream, self._opened_at = ClientStream(self._open_call(metadata=self._metadata)), self._clock()
        return self._stream


async def _answer(stream: ClientStream, request: PollTaskRequest) -> PollTaskResponse:
    """Return the answer to one poll. Raises `LinkError` where the aggregator ends the call without one."""
    # A call that has ended takes no message. Its status, which the read raises, says why.
    await stream.write(PollTasksRequest(poll=request))
    response: PollTasksResponse | object = await stream.read()
    if not isinstance(response, PollTasksResponse):
        raise LinkError("the aggregator ended the stream of polls")
    return response.answer

"""Small models that come along with their tasks: what a pull would bring, in the answer to a poll.

The rule: gRPC copies each answer and keeps the copy until it has left, and a slow reader leaves it there. So all
models on their way have a bound together. An answer waits a while for room, since a pull costs both sides more. A
worker whose model finds none pulls.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Final
from weakref import WeakKeyDictionary

from fedgrpc.aggregator.chunk_cache import PayloadFile
from fedgrpc.aggregator.payload_encoder import EncodedModel
from fedgrpc.aggregator.upload_reader import ByteBudget
from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.errors import StorageError
from fedgrpc.rpc.framing import message_of

_MOST_BYTES: Final = 16 << 20
# A model of at most so many bytes comes along whatever is on its way: a pull costs more.
LEAST_BYTES: Final = 16 << 10
# A model that comes along takes its worker's link no longer than this.
_WAIT_S: Final = 0.5


class ModelsAlong:
    """Lives on one event loop."""

    def __init__(self) -> None:
        self._room = ByteBudget(_MOST_BYTES)
        # Nothing has left in the time of a wait. Who reads nothing costs the others one wait, and not one a task.
        self._stuck = False
        self._sending = 0
        # Of models that are on their way now, each made once.
        self._made: WeakKeyDictionary[PayloadFile, asyncio.Task[bytes]] = WeakKeyDictionary()

    async def message(self, encoded: EncodedModel | None, most_bytes: int, sending: ExitStack) -> bytes:
        """Return a serialized `TaskModel` for an answer that has left when `sending` closes.

        b"": it has more than `most_bytes`, there is no room, or it cannot be read, of which the worker learns when
        it pulls.
        """
        if encoded is None or (size_bytes := encoded.manifest.size_bytes) > min(most_bytes, _MOST_BYTES):
            return b""
        if size_bytes > LEAST_BYTES:
            try:
                async with asyncio.timeout(0.0 if self._stuck else _WAIT_S):
                    await self._room.take(size_bytes)
            except TimeoutError:
                self._stuck = True
                return b""
            sending.callback(self._left, size_bytes)
        self._sending += 1
        sending.callback(self._sent)
        return encoded.header if encoded.payload is None else await self._shared(encoded, encoded.payload)

    def _left(self, size_bytes: int) -> None:
        self._stuck = False
        self._room.give_back(size_bytes)

    def _sent(self) -> None:
        self._sending -= 1
        if not self._sending:
            self._made.clear()

    async def _shared(self, encoded: EncodedModel, payload: PayloadFile) -> bytes:
        if payload not in self._made:
            self._made[payload] = asyncio.create_task(asyncio.to_thread(_message, encoded, payload))
        try:
            # One that asked first may leave while others wait.
            return await asyncio.shield(self._made[payload])
        except StorageError:
            self._made.pop(payload, None)
            return b""


def _message(encoded: EncodedModel, payload: PayloadFile) -> bytes:
    data = payload.read(0, payload.size_bytes)
    # `TaskModel` has its header and its chunk under the numbers of `PullModelResponse`.
    return encoded.header + message_of(Chunk(0, data, crc32(data)))

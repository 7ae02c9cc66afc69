"""Small models that come along with their tasks: what a pull would bring, in the answer to a poll.

The rule: gRPC copies each answer and keeps the copy until it has left, and a slow reader leaves it there. So all
models on their way have a bound together. A worker whose model is beyond it pulls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakKeyDictionary

from fedgrpc.aggregator.chunk_cache import PayloadFile
from fedgrpc.aggregator.payload_encoder import EncodedModel
from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.errors import StorageError
from fedgrpc.rpc.framing import message_of

_MOST_BYTES: Final = 16 << 20
# A model of at most so many bytes comes along whatever is on its way: a pull costs more.
LEAST_BYTES: Final = 16 << 10


class ModelsAlong:
    """Lives on one event loop."""

    def __init__(self) -> None:
        self._sending_bytes = 0
        # Of models that are on their way now, each made once.
        self._made: WeakKeyDictionary[PayloadFile, asyncio.Task[bytes]] = WeakKeyDictionary()

    @contextmanager
    def sending(self, encoded: EncodedModel | None, most_bytes: int) -> Iterator[bool]:
        """Take `encoded` along, of at most `most_bytes`, in an answer that has left when the block ends.

        False: there is no room now.
        """
        size_bytes = 0 if encoded is None else encoded.manifest.size_bytes
        fits = size_bytes <= LEAST_BYTES or self._sending_bytes + size_bytes <= _MOST_BYTES
        if encoded is None or size_bytes > most_bytes or not fits:
            yield False
            return
        self._sending_bytes += size_bytes
        try:
            yield True
        finally:
            self._sending_bytes -= size_bytes
            if not self._sending_bytes:
                self._made.clear()

    async def message(self, encoded: EncodedModel) -> bytes:
        """Return a serialized `TaskModel`. b"": it cannot be read, of which the worker learns when it pulls."""
        payload = encoded.payload
        if payload is None:
            return encoded.header
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

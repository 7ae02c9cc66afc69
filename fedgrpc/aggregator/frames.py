"""Chunks of encoded models as framed messages, each made once for all who pull, a few of them kept.

Workers of a round pull the same bytes at about the same time, so a small window serves them all. One who is far
behind reads again from the disk, and costs only itself.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import FileIO

from fedgrpc.codec.chunk import CHUNK_BYTES, chunks
from fedgrpc.errors import StorageError
from fedgrpc.rpc.framing import frame

_BATCH_BYTES = 4 * CHUNK_BYTES

Batch = asyncio.Task[list[bytes]]


@dataclass(frozen=True, eq=False)
class PayloadFile:
    """A payload of `size_bytes` that starts at byte `start` of an open file."""

    file: FileIO
    start: int
    size_bytes: int

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the payload. Raises `StorageError` when they are not all there."""
        try:
            data = os.pread(self.file.fileno(), size, self.start + offset)
        except OSError as error:
            raise StorageError(f"cannot read {self.file.name!r}: {error.strerror}") from error
        if len(data) != size:
            raise StorageError(f"{self.file.name!r} is cut short")
        return data

    def frames(self, offset: int, end: int) -> list[bytes]:
        """The chunks from `offset` to `end`, framed."""
        return [frame(chunk) for chunk in chunks(self.read, end, offset)]


class FrameCache:
    """Frames of any number of payloads, up to about `limit_bytes` of them. Lives on one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._max_batches = max(2, limit_bytes // _BATCH_BYTES)
        self._batches: OrderedDict[tuple[PayloadFile, int], Batch] = OrderedDict()

    async def frames(self, payload: PayloadFile, offset: int) -> AsyncIterator[bytes]:
        """The payload from `offset` to its end. All chunks end at multiples of their usual size."""
        aligned = -(-offset // CHUNK_BYTES) * CHUNK_BYTES
        if offset < min(aligned, payload.size_bytes):
            end = min(aligned, payload.size_bytes)
            for message in await asyncio.to_thread(payload.frames, offset, end):
                yield message
        for at in range(aligned, payload.size_bytes, CHUNK_BYTES):
            # Nothing but the one message is held while a slow reader takes it.
            yield await self._frame(payload, at)

    async def _frame(self, payload: PayloadFile, offset: int) -> bytes:
        start = offset // _BATCH_BYTES * _BATCH_BYTES
        batch = self._batch(payload, start)
        if offset == start and start + _BATCH_BYTES < payload.size_bytes:
            self._batch(payload, start + _BATCH_BYTES)
        made = batch.result() if batch.done() else await asyncio.shield(batch)
        return made[(offset - start) // CHUNK_BYTES]

    def _batch(self, payload: PayloadFile, start: int) -> Batch:
        key = (payload, start)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        end = min(start + _BATCH_BYTES, payload.size_bytes)
        batch = asyncio.create_task(asyncio.to_thread(payload.frames, start, end))
        batch.add_done_callback(lambda _: self._forget_failed(key))
        self._batches[key] = batch
        while len(self._batches) > self._max_batches:
            self._batches.popitem(last=False)
        return batch

    def _forget_failed(self, key: tuple[PayloadFile, int]) -> None:
        batch = self._batches.get(key)
        if batch is not None and batch.done() and (batch.cancelled() or batch.exception() is not None):
            del self._batches[key]

    def forget(self, payload: PayloadFile) -> None:
        """Keep nothing of it any more."""
        for key in [key for key in self._batches if key[0] is payload]:
            del self._batches[key]

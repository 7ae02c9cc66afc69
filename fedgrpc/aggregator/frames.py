"""Chunks of encoded models as framed messages, each made once for all who pull, a few of them kept.

Workers of a round pull the same bytes at about the same time, so a small window serves them all. One who is far
behind reads again from the disk, and costs only itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import FileIO

from fedgrpc.codec.chunk import CHUNK_BYTES, LARGE_CHUNK_BYTES, Pace, chunks
from fedgrpc.errors import StorageError
from fedgrpc.rpc.framing import frame

_BATCH_BYTES = LARGE_CHUNK_BYTES

Batch = asyncio.Task[list[bytes]]
# Of a batch: payload, offset, size of its chunks.
Key = tuple["PayloadFile", int, int]


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

    def frames(self, offset: int, end: int, chunk_bytes: int) -> list[bytes]:
        """The chunks from `offset` to `end`, framed."""
        return [frame(chunk) for chunk in chunks(self.read, end, offset, chunk_bytes)]


class FrameCache:
    """Frames of any number of payloads, up to about `limit_bytes` of them. Lives on one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._max_batches = max(2, limit_bytes // _BATCH_BYTES)
        self._batches: OrderedDict[Key, Batch] = OrderedDict()

    async def frames(self, payload: PayloadFile, offset: int) -> AsyncIterator[bytes]:
        """The payload from `offset` on, in larger chunks to a fast reader; all end at multiples of their size."""
        aligned = -(-offset // CHUNK_BYTES) * CHUNK_BYTES
        if offset < min(aligned, payload.size_bytes):
            end = min(aligned, payload.size_bytes)
            for message in await asyncio.to_thread(payload.frames, offset, end, CHUNK_BYTES):
                yield message
        at, pace = aligned, Pace()
        while at < payload.size_bytes:
            size = CHUNK_BYTES if at % LARGE_CHUNK_BYTES else pace.chunk_bytes
            message = await self._frame(payload, at, size)
            told_s = time.monotonic()
            # Nothing but the one message is held while a slow reader takes it.
            yield message
            pace.note(len(message), time.monotonic() - told_s)
            at += size

    async def _frame(self, payload: PayloadFile, offset: int, chunk_bytes: int) -> bytes:
        start = offset // _BATCH_BYTES * _BATCH_BYTES
        batch = self._batch(payload, start, chunk_bytes)
        if offset == start and start + _BATCH_BYTES < payload.size_bytes:
            self._batch(payload, start + _BATCH_BYTES, chunk_bytes)
        made = batch.result() if batch.done() else await asyncio.shield(batch)
        return made[(offset - start) // chunk_bytes]

    def _batch(self, payload: PayloadFile, start: int, chunk_bytes: int) -> Batch:
        key = (payload, start, chunk_bytes)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        end = min(start + _BATCH_BYTES, payload.size_bytes)
        batch = asyncio.create_task(asyncio.to_thread(payload.frames, start, end, chunk_bytes))
        batch.add_done_callback(lambda _: self._forget_failed(key))
        self._batches[key] = batch
        while len(self._batches) > self._max_batches:
            self._batches.popitem(last=False)
        return batch

    def _forget_failed(self, key: Key) -> None:
        batch = self._batches.get(key)
        if batch is not None and batch.done() and (batch.cancelled() or batch.exception() is not None):
            del self._batches[key]

    def forget(self, payload: PayloadFile) -> None:
        """Keep nothing of it any more."""
        for key in [key for key in self._batches if key[0] is payload]:
            del self._batches[key]

"""Chunks of encoded models as messages, each made once for all workers that pull, a few of them kept.

Workers of a round pull the same bytes at about the same time, so a small window serves them all. One who is far
behind reads again from the disk, and costs only itself.

gRPC copies each message and keeps the copy until it has left. So those who pull at the same time share a bound:
the more of them there are, the smaller are the messages of each.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from io import FileIO
from itertools import count
from pathlib import Path

from fedgrpc.codec.chunk import LARGE_CHUNK_BYTES, Chunk, ChunkSizer, chunks, crc32
from fedgrpc.codec.digest import new_digest
from fedgrpc.errors import StorageError
from fedgrpc.rpc.framing import message_of, parse
from fedgrpc.storage.files import read_pieces, storage_errors

# What all streams share, and what they may have in flight: both without regard to the number of workers.
CACHE_BYTES = 16 << 20
SENDING_BYTES = 16 << 20
_BATCH_BYTES = 4 << 20
# A message costs about as much as copying this much.
_LEAST_BYTES = 16 << 10

Batch = asyncio.Task[list[bytes]]
# Of a batch: payload, offset, size, and the size of its chunks.
Key = tuple["PayloadFile", int, int, int]


@dataclass(frozen=True, eq=False)
class PayloadFile:
    """A payload of `size_bytes` from byte `start` of an open file; `digest` is what it had when it was written.

    No other payload of this process has, or had, its `number`.
    """

    file: FileIO
    start: int
    size_bytes: int
    digest: bytes | None = None
    number: int = field(default_factory=count(1).__next__)

    @property
    def as_written(self) -> bool:
        """True if its bytes are those that were written, as far as that is known. Raises `StorageError`."""
        if self.digest is None:
            return True
        digest = new_digest()
        with storage_errors(Path(str(self.file.name)), "read"):
            for piece in read_pieces(self.file.fileno(), self.start, self.size_bytes):
                digest.update(piece)
        return digest.digest() == self.digest

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the payload. Raises `StorageError` when they are not all there."""
        try:
            data = os.pread(self.file.fileno(), size, self.start + offset)
        except OSError as error:
            raise StorageError(f"cannot read {self.file.name!r}: {error.strerror}") from error
        if len(data) != size:
            raise StorageError(f"{self.file.name!r} is cut short")
        return data

    def messages(self, offset: int, end: int, chunk_bytes: int) -> list[bytes]:
        """The chunks from `offset` to `end` as messages."""
        return [message_of(chunk) for chunk in chunks(self.read, end, offset, chunk_bytes)]


class ChunkCache:
    """Frames of any number of payloads, up to about `limit_bytes` of them. Lives on one event loop.

    The messages that are on their way to all who pull have about `sending_bytes` together, or 16 KiB each.
    None has more than `max_chunk_bytes` of a payload.
    """

    def __init__(
        self,
        limit_bytes: int,
        sending_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        max_chunk_bytes: int = LARGE_CHUNK_BYTES,
    ) -> None:
        self._max_chunk_bytes = 1 << min(max_chunk_bytes, LARGE_CHUNK_BYTES).bit_length() - 1
        self._limit_bytes = limit_bytes
        self._batches: OrderedDict[Key, Batch] = OrderedDict()
        self._sending_bytes = sending_bytes
        self._clock = clock
        self._pulling = 0

    @property
    def message_bytes(self) -> int:
        """Most bytes of one message now, a power of two."""
        share = self._sending_bytes // max(1, self._pulling)
        return min(self._max_chunk_bytes, max(_LEAST_BYTES, 1 << share.bit_length() >> 1))

    async def messages(self, payload: PayloadFile, offset: int) -> AsyncGenerator[bytes, None]:
        """The payload from `offset` on, in larger chunks to a faster reader; all end at multiples of their size.

        Those who pull at the same time and as fast have chunks of one size, and so the same messages.
        """
        self._pulling += 1
        try:
            at, pace = offset, ChunkSizer(least=_LEAST_BYTES)
            size = min(pace.chunk_bytes, self.message_bytes)
            while at < payload.size_bytes:
                most = self.message_bytes
                wanted = min(pace.chunk_bytes, most)
                if wanted < size or at % wanted == 0:
                    size = wanted
                end = min(at - at % size + size, at + most, payload.size_bytes)
                message = await self._message(payload, at, end, size, size == most)
                told_s = self._clock()
                # Hold only this one message while a slow reader takes it.
                yield message
                pace.note(len(message), self._clock() - told_s)
                del message
                at = end
        finally:
            self._pulling -= 1
            if not self._pulling:
                # Free the memory for what comes next: the page cache has all of it.
                self._batches.clear()

    async def _message(self, payload: PayloadFile, offset: int, end: int, chunk_bytes: int, common: bool) -> bytes:
        """The bytes from `offset` to `end`, all or a part of a chunk of `chunk_bytes`.

        A `common` size is that of all fast readers: what they ask for next is read ahead.
        """
        span = _BATCH_BYTES if common else chunk_bytes
        start = offset // span * span
        part = end - offset < chunk_bytes
        if offset != start and (payload, start, span, chunk_bytes) not in self._batches and part:
            # A whole batch for each of many small messages would be read over and over.
            return (await asyncio.to_thread(payload.messages, offset, end, chunk_bytes))[0]
        batch = self._batch(payload, start, span, chunk_bytes)
        if common and offset == start and start + span < payload.size_bytes:
            self._batch(payload, start + span, span, chunk_bytes)
        made = batch.result() if batch.done() else await asyncio.shield(batch)
        return _part(made[(offset - start) // chunk_bytes], offset, end)

    def _batch(self, payload: PayloadFile, start: int, span: int, chunk_bytes: int) -> Batch:
        key = (payload, start, span, chunk_bytes)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        end = min(start + span, payload.size_bytes)
        batch = asyncio.create_task(asyncio.to_thread(payload.messages, start, end, chunk_bytes))
        batch.add_done_callback(lambda _: self._forget_failed(key))
        self._batches[key] = batch
        while len(self._batches) > 2 and sum(span for _, _, span, _ in self._batches) > self._limit_bytes:
            self._batches.popitem(last=False)
        return batch

    def _forget_failed(self, key: Key) -> None:
        batch = self._batches.get(key)
        if batch is not None and batch.done() and (batch.cancelled() or batch.exception() is not None):
            del self._batches[key]

    def forget(self, payload: PayloadFile) -> None:
        """Drop all that is kept of a payload."""
        for key in [key for key in self._batches if key[0] is payload]:
            del self._batches[key]


def _part(message: bytes, offset: int, end: int) -> bytes:
    """The part of a chunk message from byte `offset` to `end` of the payload, itself where that is all of it."""
    whole = parse(message)
    assert whole is not None
    data = memoryview(whole.data)[offset - whole.offset : end - whole.offset]
    if len(data) == len(whole.data):
        return message
    return message_of(Chunk(offset, data, crc32(data)))

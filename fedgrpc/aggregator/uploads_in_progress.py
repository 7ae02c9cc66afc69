"""Uploads of a run that are being read, and the side streams that share their memory.

The rule: all side streams together use bounded memory, and each upload gets the same share of them. So a small
fleet has many for each, and a large one few or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fedgrpc.aggregator.upload_reader import UploadChunks, UploadReader
from fedgrpc.aio import Changes
from fedgrpc.codec.chunk import CHUNK_BYTES
from fedgrpc.errors import Exhausted, LinkError

# How long a side stream waits for the header of its upload.
_HEADER_S = 5.0
# Memory of side streams, one chunk each, in units of that of all uploads.
_MEMORY = 2
# An update that is not larger has no side streams: by the time they are there, it has come.
_SMALL_BYTES = CHUNK_BYTES


def may_have_sides(size_bytes: int) -> bool:
    """Return whether an update of this size may come over side streams."""
    return size_bytes > _SMALL_BYTES


class UploadsInProgress:
    """The readers of uploads, by token. Lives on one event loop."""

    def __init__(self, max_upload_memory_bytes: int) -> None:
        self._most = _MEMORY * max_upload_memory_bytes // CHUNK_BYTES
        self._readers: dict[str, UploadReader] = {}
        self._changes = Changes()

    @contextmanager
    def reading(self, token: str, size_bytes: int, reader: UploadReader) -> Iterator[None]:
        """Context in which an upload may have side streams, unless it is small."""
        if not may_have_sides(size_bytes):
            yield
            return
        self._readers[token] = reader
        self._changes.notify()
        try:
            yield
        finally:
            del self._readers[token]

    async def take_beside(self, token: str, chunks: UploadChunks) -> None:
        """Read a side stream to its end.

        Raises `LinkError` where its upload is not in progress, `Exhausted` where there are enough side streams,
        and as `UploadReader.beside` does.
        """
        reader = await self._reader(token)
        share = max(1, self._most // len(self._readers))
        if reader.side_count >= share or self._count() >= self._most:
            raise Exhausted("there are enough side streams; go on with those that there are")
        await reader.beside(chunks)

    async def _reader(self, token: str) -> UploadReader:
        """Return what reads an upload, whose header may be still on its way."""
        try:
            async with asyncio.timeout(_HEADER_S):
                while (reader := self._readers.get(token)) is None:
                    await self._changes.wait(self._changes.revision)
        except TimeoutError:
            raise LinkError("the upload of this side stream is not in progress") from None
        return reader

    def _count(self) -> int:
        return sum(reader.side_count for reader in self._readers.values())

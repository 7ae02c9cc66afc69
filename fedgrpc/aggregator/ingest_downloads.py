"""Downloads that an ingest process serves: chunks of an encoded model, from the open file of the run's process.

The rule: the run's process keeps the file open for as long as the call lasts, and never writes to it again. So the
ingest process opens it by that descriptor, whether or not it still has a name.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from io import FileIO
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from fedgrpc.aggregator.chunk_cache import ChunkCache, PayloadFile
from fedgrpc.rpc.ingest_process import Caller
from fedgrpc.rpc.relay import fields_of, joined
from fedgrpc.storage.files import storage_errors

DOWNLOAD: Final = b"download"


def download_order(payload: PayloadFile, offset: int, max_chunk_bytes: int) -> bytes:
    """Return the order to send a payload of this process from `offset` on."""
    place = f"/proc/{os.getpid()}/fd/{payload.file.fileno()}"
    return joined(
        (DOWNLOAD, place, *map(str, (payload.number, payload.start, payload.size_bytes, offset, max_chunk_bytes)))
    )


class IngestDownloads:
    """The downloads of one ingest process. Lives on one event loop. The bounds are those of `ChunkCache`."""

    def __init__(self, cache_bytes: int, sending_bytes: int) -> None:
        self._bounds = cache_bytes, sending_bytes
        self._caches: dict[int, ChunkCache] = {}
        # By their numbers: the file of a version that is gone is overwritten by a later one, under the same inode.
        self._payloads: WeakValueDictionary[int, PayloadFile] = WeakValueDictionary()

    async def send(self, order: bytes, caller: Caller) -> bytes:
        """Send the chunks of a payload. Raises `StorageError`."""
        _, place, *numbers = fields_of(order)
        number, start, size_bytes, offset, max_chunk_bytes = map(int, numbers)
        if (payload := self._payloads.get(number)) is None:
            opened = await asyncio.to_thread(_opened, place.decode(), start, size_bytes)
            # All who pull the same payload share its messages.
            payload = self._payloads.setdefault(number, opened)
        if max_chunk_bytes not in self._caches:
            self._caches[max_chunk_bytes] = ChunkCache(*self._bounds, max_chunk_bytes=max_chunk_bytes)
        async with aclosing(self._caches[max_chunk_bytes].messages(payload, offset)) as messages:
            async for message in messages:
                await caller.write(message)
                # It would be held here until the next one is there.
                del message
        return b""


def _opened(place: str, start: int, size_bytes: int) -> PayloadFile:
    with storage_errors(Path(place), "read"):
        return PayloadFile(FileIO(place), start, size_bytes)

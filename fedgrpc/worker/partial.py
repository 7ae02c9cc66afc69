"""A model payload while it arrives: chunks are checked and written, the digest is kept along.

header.pb      what the aggregator sent first: the download goes on only where that is the same
received       how many bytes of the payload are there, 8 bytes, little-endian
payload        these bytes, and behind them what a former use of the file has left
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Final

from fedgrpc.codec.chunk import Chunk, check_chunk, crc32
from fedgrpc.codec.manifest import Limits
from fedgrpc.errors import CorruptError
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.storage.files import RecycledFiles, pwrite, storage_errors
from fedgrpc.v1 import aggregator_pb2

HEADER: Final = "header.pb"
PAYLOAD: Final = "payload"
_RECEIVED: Final = "received"
_COUNT: Final = struct.Struct("<Q")
_READ_BYTES: Final = 1 << 20


def begin(folder: Path, header: aggregator_pb2.ModelHeader, spares: RecycledFiles) -> None:
    """Make `folder` ready for the first byte. Raises OSError."""
    (folder / HEADER).write_bytes(header.SerializeToString(deterministic=True))
    (folder / _RECEIVED).write_bytes(_COUNT.pack(0))
    os.close(spares.create(folder / PAYLOAD))


def received_bytes(folder: Path) -> int:
    """How much of the payload is there. Raises OSError, and ValueError where that is unknown."""
    try:
        return int(_COUNT.unpack((folder / _RECEIVED).read_bytes())[0])
    except struct.error as error:
        raise ValueError(f"{folder / _RECEIVED} is damaged") from error


class PartialModel:
    """A download that `begin` has begun. One task at a time uses it."""

    def __init__(self, folder: Path, header: aggregator_pb2.ModelHeader, limits: Limits) -> None:
        """Raises OSError, ValueError, and LayoutError or TooLargeError for a manifest that is refused."""
        self.folder = folder
        self.header = header
        self.manifest = manifest_from_proto(header.manifest, limits)
        self.size_bytes = 0
        self._digest, self.crc32 = hashlib.sha256(), 0
        self._received = (folder / _RECEIVED).open("r+b", buffering=0)
        self._file = (folder / PAYLOAD).open("r+b", buffering=0)
        self._rehash(self._file, min(received_bytes(folder), self.manifest.size_bytes))

    def _rehash(self, kept: FileIO, size_bytes: int) -> None:
        while piece := kept.read(min(_READ_BYTES, size_bytes - self.size_bytes)):
            self._note(piece)

    def _note(self, piece: bytes | memoryview) -> None:
        self._digest.update(piece)
        self.crc32 = crc32(piece, self.crc32)
        self.size_bytes += len(piece)

    def append(self, batch: Sequence[Chunk]) -> None:
        """Take the next chunks; raises WrongOffset, TooLargeError, LayoutError or CorruptError."""
        try:
            for chunk in batch:
                check_chunk(chunk, self.size_bytes, self.manifest.size_bytes - self.size_bytes)
                with storage_errors(self.folder):
                    pwrite(self._file.fileno(), chunk.data, self.size_bytes)
                self._note(chunk.data)
        finally:
            with storage_errors(self.folder):
                pwrite(self._received.fileno(), _COUNT.pack(self.size_bytes), 0)

    def close(self) -> None:
        """Keep what is there for the next attempt."""
        with storage_errors(self.folder):
            self._file.close()
            self._received.close()

    def finish(self) -> None:
        """Leave nothing but the whole payload. Raises CorruptError unless it is there and matches its digest."""
        if self.size_bytes != self.manifest.size_bytes:
            raise CorruptError(f"{self.size_bytes} of the model's {self.manifest.size_bytes} bytes came")
        if self._digest.digest() != self.manifest.sha256:
            raise CorruptError("the model's sha256 is not the one its manifest declares")
        with storage_errors(self.folder):
            os.truncate(self.folder / PAYLOAD, self.size_bytes)
            (self.folder / _RECEIVED).unlink()

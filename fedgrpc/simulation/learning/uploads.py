"""Journal of the updates of a simulation, whose small updates stay in memory.

The rule: a simulation plays the round again in which it was cut off, so that no update of that round has to
outlive the process. Those that go on into the next round are written. Memory is bounded: an update that does not
fit goes to a file, as in production.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import Submit
from fedgrpc.errors import CorruptError
from fedgrpc.storage.update_file import StoredUpdate, UpdateFile
from fedgrpc.storage.uploads import Upload, UploadJournal
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

_MOST_BYTES: Final = 256 << 20


class _Bytes:
    """Reads of a payload in memory. `PayloadBytes` of an update."""

    def __init__(self, payload: bytes) -> None:
        self._payload = memoryview(payload)

    def fill(self, place: int, out: np.ndarray, first: int) -> None:
        """See `PayloadBytes.fill`."""
        out[:] = np.frombuffer(self._payload, out.dtype, out.size, place + first * out.itemsize)

    def read(self, offset: int, size: int) -> memoryview:
        """See `PayloadBytes.read`."""
        return self._payload[offset : offset + size]

    def close(self) -> None:
        """See `PayloadBytes.close`."""


@dataclass(frozen=True)
class UpdateInMemory(StoredUpdate):
    """An accepted update that has no file."""

    payload: bytes = b""

    def check(self) -> None:
        """See `StoredUpdate.check`: memory does not change."""

    def open(self, submit: Submit | None = None) -> UpdateFile:
        """See `StoredUpdate.open`."""
        return UpdateFile(_Bytes(self.payload), self.manifest, submit)


@dataclass
class UploadInMemory:
    """An update on its way in, of a device of this process: what arrives is what was sent."""

    header: UpdateHeader
    manifest: Manifest
    size_bytes: int = 0
    closed: bool = False
    _parts: list[bytes] = field(default_factory=list)

    def append(self, data: bytes) -> None:
        """Commit the next bytes."""
        self._parts.append(data)
        self.size_bytes += len(data)

    def finish(self) -> UpdateInMemory:
        """See `Upload.finish`."""
        payload = b"".join(self._parts)
        if len(payload) != self.manifest.size_bytes:
            raise CorruptError("the payload is not as long as declared")
        return UpdateInMemory(Path(self.header.token), self.header, self.manifest, 0, payload)

    def seal(self) -> UpdateInMemory:
        """See `Upload.seal`."""
        self.close()
        return self.finish()

    def close(self) -> None:
        """Take nothing more."""
        self.closed = True

    def discard(self) -> None:
        """Leave nothing of it."""
        self._parts.clear()
        self.close()


class MemoryJournal(UploadJournal):
    """Journal of updates that are in memory while they take no more than `most_bytes` together."""

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        """Open the folder of updates that are too large. Raises OSError."""
        super().__init__(folder, durable=False)
        self._most_bytes = most_bytes
        self._held: dict[str, UpdateInMemory] = {}
        self._held_bytes = 0

    def begun(self, header: UpdateHeader, manifest: Manifest) -> Upload | UploadInMemory:
        """Begin the upload of `header.token`, whose device goes on from where it was. Raises `StorageError`."""
        if self._held_bytes + manifest.size_bytes > self._most_bytes:
            return self.begin(header, manifest)
        return UploadInMemory(header, manifest)

    def remember(self, token: str, update: StoredUpdate) -> None:
        """Keep an update that was sealed."""
        if not isinstance(update, UpdateInMemory):
            super().remember(token, update)
            return
        self._held[token] = update
        self._held_bytes += len(update.payload)

    def write(self, tokens: Iterable[str]) -> None:
        """Write updates to files, which a later round counts. Raises `StorageError`."""
        for token in [each for each in tokens if each in self._held]:
            update = self._held[token]
            upload = self.begin(update.header, update.manifest)
            upload.append([Chunk(0, update.payload, crc32(update.payload))])
            self.discard([token])
            self.remember(token, upload.seal())

    def load(self, token: str) -> StoredUpdate | None:
        """See `UploadJournal.load`."""
        return self._held.get(token) or super().load(token)

    def accepted(self) -> frozenset[str]:
        """See `UploadJournal.accepted`."""
        return super().accepted() | self._held.keys()

    def discard(self, tokens: Iterable[str]) -> None:
        """See `UploadJournal.discard`."""
        in_files = []
        for token in tokens:
            update = self._held.pop(token, None)
            if update is None:
                in_files.append(token)
            else:
                self._held_bytes -= len(update.payload)
        super().discard(in_files)

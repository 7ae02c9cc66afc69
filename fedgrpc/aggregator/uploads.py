"""The journal of updates: one file per update, and the files of accepted updates ARE the record of acceptance.

    TOKEN.part     an upload in progress; its length says how many bytes are committed
    TOKEN.update   a whole, verified, durable update: renaming into this name is what accepts it

Both hold a 4-byte little-endian length, that many bytes of `UpdateHeader`, then the payload. Tokens name files
only after the coordinator has found them among its own. Everything here blocks, and runs off the event loop.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from google.protobuf.message import DecodeError

from fedgrpc.aggregator.durable import fsync_folder
from fedgrpc.codec.chunk import Chunk, check_chunk
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadReader
from fedgrpc.errors import CodecError, CorruptError, StorageError
from fedgrpc.rpc.convert import manifest_from_proto
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 16 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredUpdate:
    """A whole update on disk."""

    path: Path
    header: UpdateHeader
    manifest: Manifest
    payload_start: int

    def open(self) -> UpdateFile:
        """The update, open for reading one tensor at a time."""
        return UpdateFile(self)


class UpdateFile:
    """A context manager around the open file of a `StoredUpdate`."""

    def __init__(self, update: StoredUpdate) -> None:
        self._file = update.path.open("rb")
        self._start = update.payload_start
        self.reader = PayloadReader(update.manifest, self._read)

    def __enter__(self) -> PayloadReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, self._start + offset)


class Upload:
    """An update on its way in. One task at a time uses it."""

    def __init__(self, part: Path, header: UpdateHeader, manifest: Manifest) -> None:
        self.header = header
        self.manifest = manifest
        self.size_bytes = 0
        self._part = part
        self._digest = hashlib.sha256()
        self._start = 0
        self._file = self._open()

    def _open(self) -> FileIO:
        """Continue the part on disk when it is of this very update, else begin anew."""
        text = self.header.SerializeToString(deterministic=True)
        self._start = _LENGTH.size + len(text)
        if self._part.exists():
            file = self._part.open("r+b", buffering=0)
            if file.read(self._start) == _LENGTH.pack(len(text)) + text:
                self._rehash(file)
                return file
            file.close()
        file = self._part.open("w+b", buffering=0)
        _write(file, _LENGTH.pack(len(text)) + text)
        return file

    def _rehash(self, file: FileIO) -> None:
        while data := file.read(min(_READ_BYTES, self.manifest.size_bytes - self.size_bytes)):
            self._digest.update(data)
            self.size_bytes += len(data)
        file.truncate(self._start + self.size_bytes)
        file.seek(self._start + self.size_bytes)

    @property
    def complete(self) -> bool:
        return self.size_bytes == self.manifest.size_bytes

    def append(self, batch: Sequence[Chunk]) -> None:
        """Commit consecutive chunks. Raises as `check_chunk` does, and `StorageError`.

        Those before the one at fault are then committed, it and those behind it are not.
        """
        whole: list[Chunk] = []
        at = self.size_bytes
        try:
            for chunk in batch:
                check_chunk(chunk, at, self.manifest.size_bytes - at)
                at += len(chunk.data)
                whole.append(chunk)
        finally:
            self._commit(whole)

    def _commit(self, whole: Sequence[Chunk]) -> None:
        try:
            for chunk in whole:
                _write(self._file, chunk.data)
        except OSError as error:
            self._file.truncate(self._start + self.size_bytes)
            self._file.seek(self._start + self.size_bytes)
            raise StorageError(f"cannot store an update: {error.strerror}") from error
        for chunk in whole:
            self._digest.update(chunk.data)
            self.size_bytes += len(chunk.data)

    def finish(self) -> StoredUpdate:
        """The whole update, ready to be examined. Raises `CorruptError` when its digest does not match."""
        if self._digest.digest() != self.manifest.sha256:
            self.discard()
            raise CorruptError("the payload does not match its SHA-256; send it again from the start")
        return StoredUpdate(self._part, self.header, self.manifest, self._start)

    def seal(self, durable: bool) -> None:
        """Accept: make it durable, then give it its final name. Raises `StorageError`."""
        final = self._part.with_suffix(".update")
        try:
            if durable:
                os.fsync(self._file.fileno())
            self._part.replace(final)
            if durable:
                fsync_folder(final.parent)
        except OSError as error:
            raise StorageError(f"cannot store an update: {error.strerror}") from error
        self._file.close()

    def close(self) -> None:
        """Leave the part on disk, to be continued."""
        self._file.close()

    def discard(self) -> None:
        """Forget it."""
        self.size_bytes = 0
        self._part.unlink(missing_ok=True)
        self._file.close()


class UploadJournal:
    """The folder of updates."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def begin(self, header: UpdateHeader, manifest: Manifest) -> Upload:
        """Begin or continue the upload of `header.token`. Raises `StorageError`."""
        try:
            return Upload(self._folder / f"{header.token}.part", header, manifest)
        except OSError as error:
            raise StorageError(f"cannot store an update: {error.strerror}") from error

    def committed_bytes(self, token: str) -> int:
        """Payload bytes held of an upload in progress; 0 when none is."""
        try:
            with (self._folder / f"{token}.part").open("rb") as file:
                header = file.read(_LENGTH.size)
                size_bytes = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return 0
        return max(0, size_bytes - _LENGTH.size - _LENGTH.unpack(header)[0]) if len(header) == 4 else 0

    def load(self, token: str) -> StoredUpdate | None:
        """The accepted update of `token`, None where there is none. Raises `StorageError` when unreadable."""
        path = self._folder / f"{token}.update"
        try:
            with path.open("rb") as file:
                (size,) = _LENGTH.unpack(file.read(_LENGTH.size))
                header = UpdateHeader.FromString(file.read(min(size, _MAX_HEADER_BYTES)))
            manifest = manifest_from_proto(header.manifest)
        except FileNotFoundError:
            return None
        except (OSError, struct.error, DecodeError, CodecError) as error:
            raise StorageError(f"cannot read the update {path}: {error}") from error
        return StoredUpdate(path, header, manifest, _LENGTH.size + size)

    def discard(self, tokens: Iterable[str]) -> None:
        """Remove whatever is held of these."""
        with self._storage_errors():
            for token in tokens:
                for suffix in (".part", ".update"):
                    (self._folder / f"{token}{suffix}").unlink(missing_ok=True)

    def keep_only(self, tokens: Iterable[str]) -> None:
        """Remove what belongs to no task any more, left behind by a process that died."""
        wanted = set(tokens)
        with self._storage_errors():
            for path in self._folder.iterdir():
                if path.stem not in wanted:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot use the folder {self._folder}: {error.strerror}") from error


def _write(file: FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]

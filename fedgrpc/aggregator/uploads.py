"""The journal of updates: one file per update, and the files of accepted updates ARE the record of acceptance.

    TOKEN.part     an upload in progress
    TOKEN.update   a whole, verified, durable update: renaming into this name is what accepts it

    spare/          files of updates that are done with, to be overwritten by the next

Both begin with four little-endian numbers: how many bytes of the payload are committed (8 bytes), the size of the
`UpdateHeader` (4 bytes), and the CRC-32 of the header and of these bytes (4 bytes each). Then come the header and
the payload, and what a former use has left behind. Whoever decides by a file checks it first.

A file whose sync has failed is given up, and its sender begins anew: Linux takes the pages for clean from then on,
so a second sync would succeed without writing them (https://wiki.postgresql.org/wiki/Fsync_Errors).

Tokens name files only after the coordinator has found them among its own. Everything here blocks, and runs off the
event loop.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from fedgrpc.codec.chunk import Chunk, check_chunk, crc32
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import PayloadReader, Submit, in_pieces, neighbours
from fedgrpc.codec.values import Fill
from fedgrpc.errors import CodecError, CorruptError, StorageError
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.storage.files import RecycledFiles, pwrite, sync, write_back
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

_HEAD = struct.Struct("<QIII")
_MAX_SPARES = 32
_MAX_HEADER_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_PIECE = 1 << 15


@dataclass(frozen=True)
class StoredUpdate:
    """A whole update on disk; its manifest has been validated."""

    path: Path
    header: UpdateHeader
    manifest: Manifest
    payload_start: int

    def check(self) -> None:
        """Raise `CorruptError` unless the file is what was accepted, and `StorageError` when it cannot be read."""
        try:
            with self.path.open("rb", buffering=0) as file:
                head = file.read(_HEAD.size)
                if len(head) == _HEAD.size and self._fits(head, file):
                    return
        except OSError as error:
            raise StorageError(f"cannot read the update {self.path}: {error.strerror}") from error
        raise CorruptError(f"the update {self.path.name} has changed on the disk: its CRC does not match")

    def _fits(self, head: bytes, file: FileIO) -> bool:
        committed, header_size, header_crc, payload_crc = _HEAD.unpack(head)
        if (committed, _HEAD.size + header_size) != (self.manifest.size_bytes, self.payload_start):
            return False
        if crc32(file.read(header_size)) != header_crc:
            return False
        crc, left = 0, committed
        while left and (data := file.read(min(_READ_BYTES, left))):
            crc, left = crc32(data, crc), left - len(data)
        return not left and crc == payload_crc

    def open(self, submit: Submit | None = None) -> UpdateFile:
        """The update, open for reading; with `submit` as `PayloadReader` has it."""
        return UpdateFile(self, submit)


class _PayloadBytes:
    """The payload within the open file of a `StoredUpdate`."""

    def __init__(self, update: StoredUpdate) -> None:
        self._path = update.path
        with self._storage_errors():
            self.file = update.path.open("rb")
        self._start = update.payload_start
        self._size_bytes = update.manifest.size_bytes
        self._ahead_at, self._ahead = 0, memoryview(b"")

    def fill(self, place: int, out: np.ndarray, first: int) -> None:
        """Elements from number `first` on of the tensor that lies at `place`."""
        data = out.view(np.uint8).data
        with self._storage_errors():
            size_bytes = os.preadv(self.file.fileno(), [data], self._start + place + first * out.itemsize)
        if size_bytes != len(data):
            raise StorageError(f"the update {self._path} is cut short")

    def read(self, offset: int, size: int) -> memoryview:
        if size >= _READ_BYTES:
            return self._pread(offset, size)
        within = offset - self._ahead_at
        if within < 0 or within + size > len(self._ahead):
            # Most tensors are small, and are asked for one after the other.
            self._ahead_at, within = offset, 0
            self._ahead = self._pread(offset, min(_READ_BYTES, self._size_bytes - offset))
        return self._ahead[within : within + size]

    def _pread(self, offset: int, size: int) -> memoryview:
        # numpy takes large pieces of memory as huge pages, which cost a fraction of bytes' small ones.
        data = np.empty(size, np.uint8).data
        with self._storage_errors():
            return data[: os.preadv(self.file.fileno(), [data], self._start + offset)]

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot read the update {self._path}: {error.strerror}") from error


class UpdateFile:
    """A context manager around the open file of a `StoredUpdate`.

    Nothing here refers back to its owner: what was read of thousands of updates would wait for the collector.
    """

    def __init__(self, update: StoredUpdate, submit: Submit | None = None) -> None:
        """Raises `StorageError`, as reading does."""
        self._payload = _PayloadBytes(update)
        self.reader = PayloadReader(update.manifest, self._payload.read, valid=True, submit=submit)
        self._buffers: dict[str, np.ndarray] = {}

    def __enter__(self) -> PayloadReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more reading."""
        self._payload.file.close()

    def pieces(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Every tensor in order, most of them flat in pieces that fit the cache, each good until the next."""
        for entry in self.reader.manifest.entries:
            yield from self._pieces_of(entry, entry.spec.size)

    def long_pieces(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """The same, but that a piece goes on into the tensors behind its own where they can be read in one."""
        for entry, size in self._runs():
            yield from self._pieces_of(entry, size)

    def bounds(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """As `long_pieces`, but of quantized tensors only what none of their values exceeds."""
        for entry, size in self._runs():
            bounds = self.reader.bounds(entry.spec.name)
            if bounds is not None and np.isfinite(bounds).all():
                yield entry.spec, bounds
            else:
                yield from self._pieces_of(entry, size)

    def _runs(self) -> Iterator[tuple[TensorEntry, int]]:
        """Each tensor that those behind it can be read with, and how many elements they have together."""
        entries, together = self.reader.manifest.entries, neighbours(self.reader.manifest)
        at = 0
        while at < len(entries):
            first, size = entries[at], entries[at].spec.size
            while at + 1 < len(entries) and (entries[at].spec.name, entries[at + 1].spec.name) in together:
                at += 1
                size += entries[at].spec.size
            yield first, size
            at += 1

    def _pieces_of(self, entry: TensorEntry, size: int) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        spec = entry.spec
        if not (spec.is_float and in_pieces(entry)):
            yield spec, self.reader.tensor(spec.name)
            return
        if spec.dtype not in self._buffers:
            self._buffers[spec.dtype] = np.empty(_PIECE, spec.numpy_dtype)
        fill = self.fill_from(spec.name)
        for start in range(0, size, _PIECE):
            piece = self._buffers[spec.dtype][: min(_PIECE, size - start)]
            fill(piece, start)
            yield spec, piece

    def fill_from(self, name: str) -> Fill:
        """What fills an array with elements of a tensor that is `in_pieces`."""
        place = self.reader.raw_place(name)
        return self.reader.fill_from(name) if place is None else partial(self._payload.fill, place)


class Upload:
    """An update on its way in. One task at a time uses it."""

    def __init__(
        self, part: Path, header: UpdateHeader, manifest: Manifest, spares: RecycledFiles, durable: bool = True
    ) -> None:
        self._durable = durable
        self.header = header
        self.manifest = manifest
        self.size_bytes = 0
        self._part = part
        self._digest, self._crc32 = hashlib.sha256(), 0
        text = header.SerializeToString(deterministic=True)
        self._start = _HEAD.size + len(text)
        self._header_crc32 = crc32(text)
        self._file = self._continued(text) or self._begun(text, spares)

    def _begun(self, text: bytes, spares: RecycledFiles) -> FileIO:
        return FileIO(spares.create(self._part, self._head(0) + text), "r+")

    def _head(self, committed: int) -> bytes:
        return _HEAD.pack(committed, self._start - _HEAD.size, self._header_crc32, self._crc32)

    def _continued(self, text: bytes) -> FileIO | None:
        """The part on disk, when it is of this very update."""
        try:
            file = self._part.open("r+b", buffering=0)
        except FileNotFoundError:
            return None
        head = file.read(self._start)
        if len(head) == self._start and head[_HEAD.size :] == text:
            committed, _, _, crc = _HEAD.unpack_from(head)
            self._rehash(file, min(committed, self.manifest.size_bytes))
            # Of one that is cut short the digest will tell.
            if self._crc32 == crc or self.size_bytes < committed:
                return file
        # Another update, or not what came: it begins anew.
        self._digest, self._crc32, self.size_bytes = hashlib.sha256(), 0, 0
        file.close()
        return None

    def _rehash(self, file: FileIO, committed: int) -> None:
        while data := file.read(min(_READ_BYTES, committed - self.size_bytes)):
            self._digest.update(data)
            self._crc32 = crc32(data, self._crc32)
            self.size_bytes += len(data)

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
        if not whole:
            return
        file, at, before = self._file.fileno(), self.size_bytes, self._crc32
        try:
            for chunk in whole:
                pwrite(file, chunk.data, self._start + at)
                at += len(chunk.data)
                self._crc32 = crc32(chunk.data, self._crc32)
            pwrite(file, self._head(at), 0)
            if self._durable:
                write_back(file, self._start + self.size_bytes, at - self.size_bytes)
        except OSError as error:
            self._crc32 = before
            raise StorageError(f"cannot store an update: {error.strerror}") from error
        for chunk in whole:
            self._digest.update(chunk.data)
        self.size_bytes = at

    def finish(self) -> StoredUpdate:
        """The whole update, ready to be examined. Raises `CorruptError` when its digest does not match."""
        if self._digest.digest() != self.manifest.sha256:
            self.discard()
            raise CorruptError("the payload does not match its SHA-256; send it again from the start")
        return StoredUpdate(self._part, self.header, self.manifest, self._start)

    def seal(self) -> StoredUpdate:
        """Accept: make it durable, if it is to be, then give it its final name.

        Raises `StorageError`; what could not be made durable is gone then, and is to be sent again.
        """
        final = self._part.with_suffix(".update")
        try:
            if self._durable:
                self._sync()
            self._part.replace(final)
            if self._durable:
                sync(final.parent)
        except OSError as error:
            raise StorageError(f"cannot store an update: {error.strerror}") from error
        finally:
            self._file.close()
        return StoredUpdate(final, self.header, self.manifest, self._start)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file.fileno())
        except OSError:
            self.discard()
            raise

    @property
    def closed(self) -> bool:
        return self._file.closed

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

    def __init__(self, folder: Path, durable: bool = True) -> None:
        """Accepted updates are `durable`, on the disk. Raises OSError."""
        self._folder = folder
        self._durable = durable
        self._spares = RecycledFiles(folder / "spare", _MAX_SPARES)
        self._sealed: dict[str, StoredUpdate] = {}

    def begin(self, header: UpdateHeader, manifest: Manifest) -> Upload:
        """Begin or continue the upload of `header.token`. Raises `StorageError`."""
        try:
            part = self._folder / f"{header.token}.part"
            return Upload(part, header, manifest, self._spares, self._durable)
        except OSError as error:
            raise StorageError(f"cannot store an update: {error.strerror}") from error

    def committed_bytes(self, token: str) -> int:
        """Payload bytes held of an upload in progress; 0 when none is. Raises `StorageError`."""
        try:
            with (self._folder / f"{token}.part").open("rb") as file:
                committed, header_size, _, _ = _HEAD.unpack(file.read(_HEAD.size))
                there = os.fstat(file.fileno()).st_size - _HEAD.size - header_size
        except (FileNotFoundError, struct.error):
            return 0
        except OSError as error:
            raise StorageError(f"cannot read an upload: {error.strerror}") from error
        return int(max(0, min(committed, there)))

    def remember(self, token: str, update: StoredUpdate) -> None:
        """Spare a few updates that were just sealed from being parsed again."""
        if len(self._sealed) < _MAX_SPARES:
            self._sealed[token] = update

    def load(self, token: str) -> StoredUpdate | None:
        """The accepted update of `token`, None where there is none.

        Raises `StorageError` when it cannot be read, and `CorruptError` when it is none.
        """
        if (sealed := self._sealed.get(token)) is not None:
            return sealed
        path = self._folder / f"{token}.update"
        try:
            with path.open("rb") as file:
                _, size, crc, _ = _HEAD.unpack(file.read(_HEAD.size))
                text = file.read(min(size, _MAX_HEADER_BYTES))
            if crc32(text) != crc:
                raise CorruptError("its header has changed on the disk")
            header = UpdateHeader.FromString(text)
            manifest = manifest_from_proto(header.manifest)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read the update {path}: {error}") from error
        except (struct.error, DecodeError, CodecError) as error:
            raise CorruptError(f"the update {path} is damaged: {error}") from error
        return StoredUpdate(path, header, manifest, _HEAD.size + size)

    def accepted(self) -> frozenset[str]:
        """Tokens of all accepted updates that are here. Raises `StorageError`."""
        with self._storage_errors():
            return frozenset(path.stem for path in self._folder.glob("*.update"))

    def discard(self, tokens: Iterable[str]) -> None:
        """Remove whatever is held of these."""
        with self._storage_errors():
            for token in tokens:
                self._sealed.pop(token, None)
                # An upload that nobody wants any more may still be writing to its part.
                (self._folder / f"{token}.part").unlink(missing_ok=True)
                self._spares.keep(self._folder / f"{token}.update")

    def keep_only(self, tokens: Iterable[str]) -> None:
        """Remove what belongs to no task any more, left behind by a process that died."""
        wanted = set(tokens)
        with self._storage_errors():
            for path in self._folder.iterdir():
                if path.is_file() and path.stem not in wanted:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot use the folder {self._folder}: {error.strerror}") from error

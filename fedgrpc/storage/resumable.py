"""A payload that arrives in checked chunks, over any number of connections and processes.

Three little-endian numbers come first: how many bytes of the payload are committed (8 bytes), the size of the
header and its CRC-32 (4 bytes each). Behind them is the digest of the committed bytes (16 bytes). The header
follows: what the sender declared, in any form. Then comes the payload, and behind it what a former use of the file
has left. Numbers and header may also have a file of their own; the payload then begins at byte 0 of the other.

The rule: the committed count never says more than what is there. Bytes are written before their count, and a file
is continued only where its header is the same and the committed bytes have their digest.

A file whose sync has failed is given up, and its sender starts over: Linux takes the pages for clean from then on,
so a second sync would succeed without writing them (https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

from fedgrpc.codec.chunk import Chunk, check_chunk, crc32
from fedgrpc.codec.digest import DIGEST_BYTES, new_digest
from fedgrpc.errors import CorruptError
from fedgrpc.storage.files import RecycledFiles, pwrite, read_pieces, storage_errors, write_back

_HEAD = struct.Struct(f"<QII{DIGEST_BYTES}s")
_MAX_HEADER_BYTES = 16 << 20


class ResumableFile:
    """One payload of a declared size and digest. One task at a time uses it."""

    def __init__(
        self,
        path: Path,
        header: bytes,
        size_bytes: int,
        digest: bytes,
        recycled: RecycledFiles | None = None,
        *,
        head_path: Path | None = None,
        durable: bool = True,
        what: str = "a payload",
    ) -> None:
        """Continue the file at `path`, or start it over where it is not of this very payload.

        `head_path` is where numbers and header go if they have a file of their own; `what` names the payload in
        error messages. Raises OSError.
        """
        self.path = path
        self.expected_bytes = size_bytes
        # Committed so far; the digest is always that of just these bytes.
        self.size_bytes = 0
        self._what = what
        self._durable = durable
        self._expected_digest = digest
        self._digest = new_digest()
        self._text = header
        self._header_crc32 = crc32(header)
        self._head_path = head_path
        self.payload_start = 0 if head_path else _HEAD.size + len(header)
        self._file, self._head_file = self._reopened() or self._begun(recycled)

    def _reopened(self) -> tuple[FileIO, FileIO] | None:
        try:
            file = self.path.open("r+b", buffering=0)
        except FileNotFoundError:
            return None
        try:
            head_file = self._head_path.open("r+b", buffering=0) if self._head_path else file
        except FileNotFoundError:
            file.close()
            return None
        if self._continues(file, head_file):
            return file, head_file
        # Another payload, or not the bytes that were committed: none of them is kept.
        self.size_bytes, self._digest = 0, new_digest()
        file.close()
        head_file.close()
        return None

    def _continues(self, file: FileIO, head_file: FileIO) -> bool:
        # The header has size, digest and recipe of the payload: the same header, and so the same payload.
        head = os.pread(head_file.fileno(), _HEAD.size + len(self._text), 0)
        if len(head) != _HEAD.size + len(self._text) or head[_HEAD.size :] != self._text:
            return False
        committed, _, _, digest = _HEAD.unpack_from(head)
        # A digest cannot be stored half way, so the bytes are read once more. They are checked by the way.
        for piece in read_pieces(file.fileno(), self.payload_start, min(committed, self.expected_bytes)):
            self._digest.update(piece)
            self.size_bytes += len(piece)
        # A file cut short by a crash has no digest of what is left: that of the whole decides in the end.
        return bool(self._digest.digest() == digest or self.size_bytes < committed)

    def _begun(self, recycled: RecycledFiles | None) -> tuple[FileIO, FileIO]:
        head = self._head(0) + self._text
        create = _create if recycled is None else recycled.create
        if self._head_path is None:
            file = FileIO(create(self.path, head), "r+")
            return file, file
        # First of all: without it the payload's file, which may be a recycled one, means nothing.
        self._head_path.write_bytes(head)
        return FileIO(create(self.path), "r+"), self._head_path.open("r+b", buffering=0)

    def _head(self, committed_bytes: int) -> bytes:
        return _HEAD.pack(committed_bytes, len(self._text), self._header_crc32, self._digest.digest())

    @property
    def complete(self) -> bool:
        """True if every byte is committed."""
        return self.size_bytes == self.expected_bytes

    @property
    def matches_digest(self) -> bool:
        """True if the committed bytes have the declared digest."""
        return self._digest.digest() == self._expected_digest

    def sha256(self) -> bytes:
        """Return the SHA-256 of the committed bytes as they are on the disk now. Raises OSError."""
        digest = hashlib.sha256()
        with self.path.open("rb", buffering=0) as file:
            for piece in read_pieces(file.fileno(), self.payload_start, self.size_bytes):
                digest.update(piece)
        return digest.digest()

    def append(self, batch: Sequence[Chunk]) -> None:
        """Commit consecutive chunks.

        Those before one at fault are committed; that one and those behind it are not.

        Raises:
            StorageError: the disk does not take them; none is committed.
            WrongOffset, TooLargeError, CorruptError: as `check_chunk`.
        """
        # All checks come before the first write, and one write of the count serves the whole batch.
        checked: list[Chunk] = []
        at = self.size_bytes
        try:
            for chunk in batch:
                check_chunk(chunk, at, self.expected_bytes - at)
                at += len(chunk.data)
                checked.append(chunk)
        finally:
            if checked:
                self._commit(checked)

    def _commit(self, chunks: Sequence[Chunk]) -> None:
        handle, at, before = self._file.fileno(), self.size_bytes, self._digest.copy()
        try:
            with storage_errors(self._what, "store"):
                for chunk in chunks:
                    # First: the bytes are then in the cache for the write.
                    self._digest.update(chunk.data)
                    pwrite(handle, chunk.data, self.payload_start + at)
                    at += len(chunk.data)
                # After the bytes: a kill in between loses the chunks, and never counts what is not there.
                pwrite(self._head_file.fileno(), self._head(at), 0)
        except BaseException:
            # The count on the disk is still the former one: the sender sends these chunks again.
            self._digest = before
            raise
        if self._durable:
            # The sync at the end then has little left to write.
            write_back(handle, self.payload_start + self.size_bytes, at - self.size_bytes)
        self.size_bytes = at

    def publish(self, final: Path, sync_folder: Callable[[], None]) -> None:
        """Make the file durable, if it is to be, and give it the name `final`; `sync_folder` makes names durable.

        Raises `StorageError`; what could not be made durable is gone then, and has to be sent again.
        """
        try:
            with storage_errors(self._what, "store"):
                # Content before name: after a power cut, the name means that all of the content is there.
                if self._durable:
                    self._sync()
                self.path.replace(final)
                if self._durable:
                    # Without this a power cut may take the name away again, though the bytes are there.
                    sync_folder()
        finally:
            self.close()

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file.fileno())
        except OSError:
            # See the module: a second sync would succeed without having written anything.
            self.discard()
            raise

    @property
    def closed(self) -> bool:
        """True if nothing more can be appended."""
        return self._file.closed

    def close(self) -> None:
        """Leave the file on the disk, to be continued."""
        self._file.close()
        self._head_file.close()

    def discard(self) -> None:
        """Remove the file. Raises OSError."""
        self.size_bytes = 0
        self.path.unlink(missing_ok=True)
        self.close()


def _create(path: Path, head: bytes = b"") -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    pwrite(handle, head, 0)
    return handle


def committed_bytes(path: Path, head_path: Path | None = None) -> int:
    """Return the bytes of a payload that a `ResumableFile` would continue from, or 0. Raises OSError."""
    try:
        with (head_path or path).open("rb") as file:
            committed, header_bytes, *_ = _HEAD.unpack(file.read(_HEAD.size))
        start = 0 if head_path else _HEAD.size + header_bytes
        # The count may say more than a power cut has left.
        return int(max(0, min(committed, path.stat().st_size - start)))
    except (FileNotFoundError, struct.error):
        return 0


def read_header(path: Path) -> tuple[bytes, int]:
    """Return the header of a file that has it in front, and the offset of its payload.

    Raises:
        CorruptError: the header is not what was written.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise CorruptError("it is cut short")
        _, size_bytes, crc, _ = _HEAD.unpack(head)
        # Its size is no more to be trusted than its content, which the CRC covers.
        text = file.read(min(size_bytes, _MAX_HEADER_BYTES))
    if crc32(text) != crc:
        raise CorruptError("its header has changed on the disk")
    return text, _HEAD.size + size_bytes


def is_whole(path: Path, size_bytes: int, payload_start: int) -> bool:
    """Return whether a file with its header in front is all `size_bytes` that were committed. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return False
        committed, header_bytes, header_crc, wanted = _HEAD.unpack(head)
        if (committed, _HEAD.size + header_bytes) != (size_bytes, payload_start):
            return False
        if crc32(file.read(header_bytes)) != header_crc:
            return False
        digest, left = new_digest(), committed
        for piece in read_pieces(file.fileno(), payload_start, committed):
            digest.update(piece)
            left -= len(piece)
        return not left and digest.digest() == wanted

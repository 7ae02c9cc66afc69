"""Files and folders that are whole whatever happens: a kill, a full disk, a power cut.

Three rules:

A name means a complete content. A file or folder is filled under an unfinished name (`UNFINISHED`), synced, and
renamed; its parent folder is synced too before anybody is told, since a rename alone may be lost.

No error of the disk says that content is wrong. Only content that was read says so: a digest, a CRC, a size. A
file that cannot be read now (EIO, EMFILE, ENOMEM, EACCES, a mount that went away for a moment) is kept and tried
again later. Nothing is removed for it, and nothing is taken for absent.

Files as large as the model are overwritten rather than created (`RecycledFiles`). A new file needs new blocks,
new pages in the cache, and a commit of the file system's journal; one that is overwritten has them all. On a
machine whose hypervisor takes back free memory, the new pages alone cost twenty times as much as the write.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import StorageError

# Prefix of files and folders that are being filled. One that is left after a crash is swept away.
UNFINISHED: Final = ".new-"
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
# Bytes to write before the kernel is asked to begin writing them back. Fewer are not worth the call.
_WRITE_BACK_EVERY_BYTES: Final = 4 << 20
_WRITE_BACK_LEAST_BYTES: Final = 256 << 10
# A piece that was read and is summed at once is still in the processor's second cache.
_CACHED_BYTES: Final = 256 << 10
_SYNC_FILE_RANGE_WRITE: Final = 2  # <fcntl.h> of Linux
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


@contextmanager
def storage_errors(subject: Path | str, verb: str = "use") -> Iterator[None]:
    """Turn what the system refuses (full, read-only, gone) into `StorageError`: "cannot `verb` `subject`: ...".

    Give text rather than a path where the message travels: paths of the aggregator are no business of a worker.
    """
    try:
        yield
    except OSError as error:
        name = (error.filename or subject) if isinstance(subject, Path) else subject
        raise StorageError(f"cannot {verb} {name}: {error.strerror or error}") from error


def is_gone(error: OSError) -> bool:
    """Return whether the error says that there is no such file. After any other one, try again later."""
    return error.errno in _GONE


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | memoryview, *, private: bool = False) -> None:
    """Write one file durably; readers see the old content or the new, never a mix. Raises OSError.

    `private`: only this user may read it, whatever the umask.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    with unfinished.open("wb") as file:
        if private:
            os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        # Before the rename: file systems may write the new name before the content.
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


def make_private(folder: Path) -> None:
    """Make `folder`, with those above it, for this user alone; one that is there stays as it is. Raises OSError.

    Updates of single devices, tokens and models lie there.
    """
    for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)


def empty_folder(path: Path) -> Path:
    """Make the folder `path`, in place of what a full disk has left of it. Raises OSError."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def publish_folder(unfinished: Path, final: Path) -> None:
    """Sync every file of `unfinished` and rename it to `final`, which must not exist. Raises OSError."""
    # One after the other: a journal that is written for the first is written for all, and threads cost more.
    for path in (*unfinished.iterdir(), unfinished):
        sync(path)
    unfinished.rename(final)
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. Raises OSError."""
    # Renamed first: a crash half way leaves an unfinished name, for `sweep`, and no half folder under its own.
    doomed = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a crash has left unfinished in `folder`. Raises OSError."""
    for path in folder.glob(UNFINISHED + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def folder_size_bytes(folder: Path) -> int:
    """Bytes of the files directly in `folder`. Raises OSError."""
    return sum(path.stat().st_size for path in folder.iterdir())


def pwrite(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        # One call may take a part only: near the end of a disk, and never more than 2 GiB.
        size = os.pwrite(handle, view, offset)
        view, offset = view[size:], offset + size


def read_pieces(handle: int, start: int, size: int) -> Iterator[memoryview]:
    """Read `size` bytes of an open file from `start`, in pieces that stay in the cache, each good until the next.

    Ends early where the file does. Raises OSError.
    """
    buffer = memoryview(bytearray(min(size, _CACHED_BYTES)))
    while size and (got := os.preadv(handle, [buffer[: min(size, len(buffer))]], start)):
        yield buffer[:got]
        start, size = start + got, size - got


def write_back(handle: int, offset: int, size: int) -> None:
    """Begin to bring these bytes of a file to the disk; advice, which does not wait and cannot fail."""
    if _sync_file_range is not None and size >= _WRITE_BACK_LEAST_BYTES:
        _sync_file_range(handle, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


class WrittenBack(FileIO):
    """A file on its way to the disk while it is still being written, so that syncing it has little left to do."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "w")
        self._begun = self._written = 0

    def write(self, data: Any) -> int:
        """Write as `FileIO.write` does."""
        size = super().write(data)
        self._written += size
        if self._written - self._begun >= _WRITE_BACK_EVERY_BYTES:
            write_back(self.fileno(), self._begun, self._written - self._begun)
            self._begun = self._written
        return size


class RecycledFiles:
    """Removed files, kept under `folder` to become the next ones. Thread-safe.

    `max_files` are kept, and more as long as they have `max_bytes` at most together.

    The rule: nobody has a file open any more that is given to `keep`, since its content will change.
    """

    def __init__(self, folder: Path, max_files: int, max_bytes: int = 0) -> None:
        """Take up what a former process has kept. Raises OSError."""
        make_private(folder)
        self._folder = folder
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept = list(folder.iterdir())
        self._sizes = {path: path.stat().st_size for path in self._kept}
        self._kept_bytes = sum(self._sizes.values())
        # Behind the numbers of a former process: a name that is in use would be overwritten.
        self._numbers = count(1 + max((_number(path) for path in self._kept), default=0))

    def create(self, path: Path, head: bytes = b"") -> int:
        """Make the file `path`, which begins with `head`; behind that is anything. Returns its descriptor.

        Raises OSError; a kept file that fails is not used again.
        """
        with self._lock:
            kept = self._kept.pop() if self._kept else None
            if kept is not None:
                self._kept_bytes -= self._sizes.pop(kept)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        handle = os.open(path, flags | os.O_TRUNC, 0o600) if kept is None else os.open(kept, flags, 0o600)
        try:
            # Before the rename: under its new name the file must never show the head of its former use.
            pwrite(handle, head, 0)
            if kept is not None:
                kept.replace(path)
        except BaseException:
            # Whatever it is: the caller has got no descriptor to close.
            os.close(handle)
            raise
        return handle

    def keep(self, path: Path) -> None:
        """Remove the file `path`, if there is one. Raises OSError."""
        with self._lock, suppress(FileNotFoundError):
            size_bytes = path.stat().st_size
            if len(self._kept) >= self._max_files and self._kept_bytes + size_bytes > self._max_bytes:
                path.unlink()
                return
            kept = self._folder / str(next(self._numbers))
            path.replace(kept)
            self._kept.append(kept)
            self._sizes[kept] = size_bytes
            self._kept_bytes += size_bytes


def _number(path: Path) -> int:
    return int(path.name) if path.name.isdigit() else 0

"""Files that are written again and again, overwritten in place rather than made anew.

A round writes files as large as the model and removes those of the round before. A new file needs new blocks, new
pages in the cache, and a commit of the file system's journal; one that is overwritten has them all. On a machine
whose hypervisor takes back free memory, the new pages alone cost twenty times as much as the write.

A folder under its final name is complete: it is filled under a temporary name, synced, and renamed.

No error of the disk says that content is wrong. Only content that was read says so: a digest, a CRC, a size. A
file that cannot be read now (EIO, EMFILE, ENOMEM, EACCES, a mount that went away for a moment) is kept and tried
again later. Nothing is removed for it, and nothing is taken for absent.
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

UNFINISHED: Final = ".new-"
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
_BEHIND_BYTES = 4 << 20
_WORTH_BYTES = 256 << 10
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h> of Linux
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def make_private(folder: Path) -> None:
    """Make `folder`, with those above it, for this user alone; one that is there stays as it is. Raises OSError.

    Updates of single devices, tokens and models lie there.
    """
    for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)


class RecycledFiles:
    """Removed files kept under `folder` for the next ones, `max_files` at most. Thread-safe.

    The rule: nobody has a file open any more that is given to `keep`, since its content will change.
    """

    def __init__(self, folder: Path, max_files: int) -> None:
        """Raises OSError."""
        make_private(folder)
        self._folder = folder
        self._max_files = max_files
        self._lock = threading.Lock()
        self._spares = list(folder.iterdir())
        self._numbers = count(1 + max((_number(path) for path in self._spares), default=0))

    def create(self, path: Path, head: bytes = b"") -> int:
        """A descriptor of the file `path`, which begins with `head`; what follows is anything. Raises OSError."""
        with self._lock:
            spare = self._spares.pop() if self._spares else None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        handle = os.open(path, flags | os.O_TRUNC, 0o600) if spare is None else os.open(spare, flags, 0o600)
        try:
            pwrite(handle, head, 0)
            if spare is not None:
                spare.replace(path)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def keep(self, path: Path) -> None:
        """Remove the file `path`, if there is one. Raises OSError."""
        with self._lock, suppress(FileNotFoundError):
            if len(self._spares) >= self._max_files:
                path.unlink()
                return
            spare = self._folder / str(next(self._numbers))
            path.replace(spare)
            self._spares.append(spare)


def pwrite(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        size = os.pwrite(handle, view, offset)
        view, offset = view[size:], offset + size


class WrittenBack(FileIO):
    """A file that is on its way to the disk while it is written, so that syncing it has little left to do."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "w")
        self._begun = self._written = 0

    def write(self, data: Any) -> int:
        """As `FileIO.write`."""
        size = super().write(data)
        self._written += size
        if self._written - self._begun >= _BEHIND_BYTES:
            write_back(self.fileno(), self._begun, self._written - self._begun)
            self._begun = self._written
        return size


def write_back(handle: int, offset: int, size: int) -> None:
    """Begin to bring these bytes of a file to the disk; advice, that does not wait and cannot fail.

    A few bytes are not worth it: whoever syncs them waits no longer.
    """
    if _sync_file_range is not None and size >= _WORTH_BYTES:
        _sync_file_range(handle, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def _number(path: Path) -> int:
    return int(path.name) if path.name.isdigit() else 0


@contextmanager
def storage_errors(subject: Path | str, verb: str = "use") -> Iterator[None]:
    """Around disk work: what the system refuses (full, read-only, gone) becomes a `StorageError`.

    Its message is "cannot `verb` `subject`". A subject that is text is named as it is: messages travel to workers,
    and paths of the aggregator are none of their business.
    """
    try:
        yield
    except OSError as error:
        name = (error.filename or subject) if isinstance(subject, Path) else subject
        raise StorageError(f"cannot {verb} {name}: {error.strerror or error}") from error


def empty_folder(path: Path) -> Path:
    """Make the folder `path`, in place of what a full disk has left of it. Raises OSError."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write and sync one file; readers see the old content or the new, never a mix."""
    unfinished = path.with_name(UNFINISHED + path.name)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


def publish_folder(unfinished: Path, final: Path) -> None:
    """Sync every file of `unfinished` and rename it to `final`, which must not exist."""
    # One after the other: a journal that is written for the first is written for all, and threads cost more.
    for path in (*unfinished.iterdir(), unfinished):
        sync(path)
    unfinished.rename(final)
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a crash half way leaves it under an unfinished name, to be swept at the next start."""
    doomed = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a crash left unfinished in `folder`."""
    for path in folder.glob(UNFINISHED + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def folder_size_bytes(folder: Path) -> int:
    """Bytes of the files directly in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir())


def is_gone(error: OSError) -> bool:
    """Whether there is no such file. Any other error is for later."""
    return error.errno in _GONE

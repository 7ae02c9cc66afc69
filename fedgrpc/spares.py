"""Files that are written again and again, overwritten in place rather than made anew.

A round writes files as large as the model and removes those of the round before. A new file needs new blocks, new
pages in the cache, and a commit of the file system's journal; one that is overwritten has them all. On a machine
whose hypervisor takes back free memory, the new pages alone cost twenty times as much as the write.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

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


class SpareFiles:
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

"""One folder of one process: its lock, and the random id that it keeps."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedgrpc.errors import UsageError
from fedgrpc.process import kept_from_children
from fedgrpc.storage.files import make_private, storage_errors, write_file

_CHECK_INTERVAL_S: Final = 1.0
_FOLDER_ID: Final = "folder-id"
_ID: Final = re.compile(r"[0-9a-f]{32}")


class HeldFolder:
    """A folder that this process alone uses. The lock is on the folder itself: there is no file to be deleted."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def check(self) -> None:
        """Raise `UsageError` when the folder has been removed, or another one put in its place."""
        held = os.fstat(self._descriptor)
        try:
            found = self.path.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise UsageError(f"the folder {self.path} was removed while it was in use; start again with a new one")

    async def until_removed(self) -> None:
        """Raise `UsageError` once the folder is gone: a new one in its place has no lock."""
        while True:
            self.check()
            await asyncio.sleep(_CHECK_INTERVAL_S)


@contextmanager
def hold_folder(path: Path, in_use: str, kind: str = "folder") -> Iterator[HeldFolder]:
    """Make the folder and hold it for this process alone, and not for its children.

    Raises:
        UsageError: it cannot be made or written, or, in the words of `in_use`, another process holds it.
    """
    try:
        make_private(path)
        # Before the lock: a read-only folder can be locked, and would fail at the first update.
        if not os.access(path, os.W_OK | os.X_OK):
            raise UsageError(f"cannot use the {kind} {path}: it cannot be written")
        descriptor = _lock(path)
    except BlockingIOError:
        raise UsageError(f"the {kind} {path} {in_use}") from None
    except OSError as error:
        raise UsageError(f"cannot use the {kind} {path}: {error.strerror}") from error
    try:
        # A child that outlived a killed parent would hold the folder, and no new process could start in it.
        with kept_from_children(descriptor):
            yield HeldFolder(path, descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Open and lock a folder. Raises OSError, `BlockingIOError` where another process has the lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The kernel drops the lock with the last descriptor: kill -9 leaves none behind.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        # Whatever it is: the caller has got no descriptor to close.
        os.close(descriptor)
        raise
    return descriptor


def folder_id(folder: Path) -> str:
    """Read the random id that `folder` keeps; write one into a folder without.

    Raises:
        StorageError: the id cannot be read or written.
    """
    path = folder / _FOLDER_ID
    with storage_errors(path):
        try:
            found = path.read_text(errors="replace").strip()
        except FileNotFoundError:
            found = ""
        if not _ID.fullmatch(found):
            # None yet, or a file that a former power cut has emptied.
            found = secrets.token_hex(16)
            write_file(path, f"{found}\n".encode())
    return found

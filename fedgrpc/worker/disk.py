"""What the worker writes is on the disk, whole, before anything relies on it.

A folder under its final name is complete: it is filled under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedgrpc.errors import StorageError
from fedgrpc.rpc.identity import Session

UNFINISHED: Final = ".new-"
IN_USE: Final = "is used by another worker; give each worker its own --state-dir"
_IDENTITY: Final = "identity"
_ID: Final = re.compile(r"[0-9a-f]{32}")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Around disk work: what the system refuses (full, read-only, gone) is a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot use {error.filename or path}: {error.strerror or error}") from error


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


def session_in(folder: Path) -> Session:
    """The session of this process, under the random id that `folder` keeps.

    Raises:
        StorageError: the id cannot be read or written.
    """
    path = folder / _IDENTITY
    with storage_errors(path):
        try:
            folder_id = path.read_text(errors="replace").strip()
        except FileNotFoundError:
            folder_id = ""
        if not _ID.fullmatch(folder_id):
            folder_id = secrets.token_hex(16)
            write_file(path, f"{folder_id}\n".encode())
    return Session.begin(folder_id)

"""A copy of a data folder in one file, taken while its aggregator works, and the way back.

A backup is a tar file. Its last member, `backup.json`, has the size and SHA-256 of every other one.

    databases      by SQLite's own backup, each as of one moment, before any other file
    models         those that the copied database knows; each checked by its own sum once it is copied
    the rest       as it is: accepted updates, certificates and keys, the audit log to its last whole line
    left out       what is made again when it is needed: encoded models, delta bases, files to be used again

The rule: what a file says was true at the moment of its database. Where a version that the database ends with was
let go meanwhile, the copy begins again. A restored folder appears under its name once every digest was right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import IO, Any, Final

from fedgrpc.errors import CorruptError, StorageError, UsageError
from fedgrpc.storage.database import DATABASE, database_errors
from fedgrpc.storage.files import UNFINISHED, make_private, storage_errors, sync
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.storage.run_store import RunStore

MANIFEST: Final = "backup.json"
_FORMAT: Final = 1
_TRIES: Final = 5
_DATABASE_SUFFIX: Final = ".sqlite"
# The link of the page counts for one process.
_LEFT_OUT: Final = frozenset({"encoded", "delta-bases", "recycled", "recycled-differences", "page.link"})
_LEFT_OUT_SUFFIXES: Final = (".part", "-wal", "-shm", "-journal", ".download")
_VERSION: Final = re.compile(r"(\d+)\.safetensors")
_OF_VERSIONS: Final = frozenset({"models", "optimizer"})
_LINES: Final = ".jsonl"
_PIECE_BYTES: Final = 1 << 20
_MAX_MANIFEST_BYTES: Final = 64 << 20
_MAX_FILES: Final = 1_000_000
# A time in the year 5138; nothing later can be shown.
_LATEST_S: Final = 1e11


class _Gone(Exception):
    """A file that the copy needs was let go while it was copied."""


@dataclass
class Backup:
    """Contents of a backup: size and digest by path."""

    created_at: float
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())


def write_backup(folder: Path, path: Path) -> Backup:
    """Copy a data folder into the new file `path`, which only this user may read: it holds keys.

    Raises `UsageError` for a folder without a run and for a file that is there, and `StorageError`.
    """
    if path.exists():
        raise UsageError(f"{path} exists: remove it, or choose another name")
    if not any(folder.rglob(DATABASE)):
        raise UsageError(f"{folder} is not an aggregator's data folder: it has no {DATABASE}")
    with storage_errors(path), _scratch(path) as scratch:
        part = scratch / "backup"
        for _ in range(_TRIES):
            try:
                with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b") as file:
                    backup = _write(folder, file, scratch)
                    os.fsync(file.fileno())
            except _Gone:
                continue
            part.replace(path)
            sync(path.absolute().parent)
            return backup
    raise StorageError(
        f"cannot copy {folder}: its versions are let go faster than they are copied; keep more of them"
    )


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`: copies are made there before they are added."""
    folder = Path(mkdtemp(dir=path.absolute().parent, prefix=f"{UNFINISHED}{path.name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, file: IO[bytes], scratch: Path) -> Backup:
    backup = Backup(time.time())
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        last: dict[Path, int] = {}
        for path in sorted(folder.rglob(f"*{_DATABASE_SUFFIX}")):
            if _is_wanted(path.relative_to(folder)):
                copy = scratch / "database"
                _copy_database(path, copy)
                if path.name == DATABASE:
                    last[path.parent] = _last_version(copy)
                _add(tar, backup, copy, path.relative_to(folder))
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if (
                path.is_symlink()
                or not path.is_file()
                or path.suffix == _DATABASE_SUFFIX
                or not _is_wanted(inside)
            ):
                continue
            copy = scratch / "file"
            if _copy(path, copy, last):
                _add(tar, backup, copy, inside)
        content = json.dumps(
            {"format": _FORMAT, "created_at": backup.created_at, "files": backup.files}, indent=1
        ).encode()
        manifest = scratch / MANIFEST
        manifest.write_bytes(content)
        tar.add(manifest, MANIFEST, filter=_plain)
    _check_complete(folder, backup, last)
    return backup


def _is_wanted(inside: Path) -> bool:
    names = inside.parts
    return not (
        _LEFT_OUT.intersection(names)
        or any(name.startswith(UNFINISHED) for name in names)
        or names[-1].endswith(_LEFT_OUT_SUFFIXES)
    )


def _copy_database(path: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    with (
        database_errors(path),
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        # All pages in one step, and so of one moment, however much is committed meanwhile.
        source.backup(target)


def _last_version(database: Path) -> int:
    """Return the version that a copied database ends with, if it has a model; else 0."""
    with closing(RunStore(database, read_only=True)) as store:
        version = store.latest_version()
    return version.version if version is not None and version.sha256 else 0


def _copy(path: Path, copy: Path, last: dict[Path, int]) -> bool:
    """Copy a file as it is; return whether it belongs into the backup. It may be let go meanwhile."""
    version = _VERSION.fullmatch(path.name)
    of_version = path.parent.name in _OF_VERSIONS and version is not None and path.parent.parent in last
    if of_version and version is not None and int(version[1]) > last[path.parent.parent]:
        # Committed after the moment of the database.
        return False
    try:
        shutil.copyfile(path, copy)
        changed_at = path.stat().st_mtime_ns
        os.utime(copy, ns=(changed_at, changed_at))
    except FileNotFoundError:
        return False
    if of_version:
        try:
            # Files of former versions are written over.
            return ModelFile.open(copy).as_written
        except UsageError:
            return False
    if path.suffix == _LINES:
        _cut_to_lines(copy)
    return True


def _cut_to_lines(path: Path) -> None:
    """Remove half a line at the end of a copied log."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _PIECE_BYTES)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)


def _add(tar: tarfile.TarFile, backup: Backup, copy: Path, inside: Path) -> None:
    digest = hashlib.sha256()
    with copy.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    name = inside.as_posix()
    backup.files[name] = copy.stat().st_size, digest.hexdigest()
    tar.add(copy, name, filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out whose file it was."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _check_complete(folder: Path, backup: Backup, last: dict[Path, int]) -> None:
    """Raise `_Gone` where the version that a database ends with is not in the backup."""
    for run, version in last.items():
        name = (run.relative_to(folder) / "models" / f"{version:06d}.safetensors").as_posix()
        if version and name not in backup.files:
            raise _Gone


def read_manifest(path: Path) -> Backup:
    """Return what a backup holds, on its own word. Raises `UsageError` for a file that is none."""
    with _opened(path) as tar:
        for member in tar:
            if member.name == MANIFEST:
                return _manifest_of(tar, member, path)
    raise UsageError(f"{path} is no whole backup: it has no {MANIFEST} at its end")


def restore_backup(path: Path, folder: Path) -> Backup:
    """Make the data folder `folder` of a backup; it may be there, if it is empty.

    Raises `UsageError` for a folder that is not empty and a file that is no backup, `CorruptError` where a digest
    is wrong, and `StorageError`. Nothing is then at `folder`.
    """
    with storage_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty: name a new folder, or remove it")
        make_private(folder.absolute().parent)
        # A name of its own: of two that restore at the same time, neither removes what the other has written.
        unfinished = Path(mkdtemp(dir=folder.absolute().parent, prefix=f"{UNFINISHED}{folder.name}-"))
        try:
            backup = _extract(path, unfinished)
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)
            sync(folder.absolute().parent)
        except BaseException:
            # Ctrl-C, too: a restore leaves all or nothing.
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return backup


def _extract(path: Path, folder: Path) -> Backup:
    found: dict[str, tuple[int, str]] = {}
    declared: Backup | None = None
    with _opened(path) as tar:
        for member in tar:
            if declared is not None or len(found) > _MAX_FILES:
                raise CorruptError(f"{path} has something behind its end")
            if member.name == MANIFEST:
                declared = _manifest_of(tar, member, path)
                continue
            found[member.name] = _extract_file(tar, member, folder, path)
    if declared is None:
        raise CorruptError(f"{path} is cut short: it has no {MANIFEST} at its end")
    if found != declared.files:
        wrong = sorted(found.items() ^ declared.files.items())[0][0]
        raise CorruptError(f"{path} is damaged: {wrong} is not what was written")
    for each in sorted({folder, *(parent for parent in folder.rglob("*") if parent.is_dir())}, reverse=True):
        sync(each)
    return declared


def _extract_file(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, path: Path) -> tuple[int, str]:
    """Write one file, durably; return its size and digest."""
    parts = PurePosixPath(member.name).parts
    # A sparse member says in a few bytes how many zeros it is to be.
    plain = member.isreg() and not member.issparse() and "\0" not in member.name
    if not plain or not 0 <= member.mtime < _LATEST_S or not parts or member.name.startswith("/") or ".." in parts:
        raise CorruptError(f"{path} is no backup of fedgrpc: it holds {member.name[:80]!r}")
    content, target = tar.extractfile(member), folder.joinpath(*parts)
    assert content is not None
    make_private(target.parent)
    digest = hashlib.sha256()
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.utime(file.fileno(), (member.mtime, member.mtime))
        os.fsync(file.fileno())
    return member.size, digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    # ValueError: headers whose numbers are none.
    except (tarfile.TarError, ValueError) as error:
        raise UsageError(f"{path} is no backup of fedgrpc, or cut short: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read the backup {path}: {error.strerror or error}") from error


def _manifest_of(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Backup:
    content = tar.extractfile(member) if member.isreg() and member.size <= _MAX_MANIFEST_BYTES else None
    try:
        read: Any = json.loads(content.read() if content is not None else b"")
        if read["format"] != _FORMAT:
            raise UsageError(f"{path} is of another version of fedgrpc: format {str(read['format'])[:20]}")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in read["files"].items()}
        created_at = float(read["created_at"])
        if not 0 <= created_at < _LATEST_S:
            raise ValueError(created_at)
        return Backup(created_at, files)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path} is damaged: its {MANIFEST} cannot be read") from error

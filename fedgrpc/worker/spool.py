"""Finished updates on the worker's disk, from before their upload starts until they are acknowledged.

    spool/00000007/        one update: payload, residual (what it leaves behind), personal (layers that stay here),
                           kept (by the run's algorithm); the last three only where there is something in them
    spool/residual         the residual that the next update starts from
    spool/kept             what the run's algorithm keeps here, as of the last update that was acknowledged
    spool/personal         the personal layers of the last update that is gone

The payload's file ends with the `UpdateHeader`, the `Task`, and the sizes of both in bytes. One file less to sync.

An update that cannot be read now is kept, and tried again later. Only content that was read can be corrupt.

The rule: an update's folder is complete and durable once it has its name. What was trained and what it leaves
behind survive a power cut together or not at all. An acknowledged update's residual becomes the current one, by
one rename that is durable before the update is removed. A refused update's residual is dropped with it. What an
algorithm keeps goes the same way. Personal
layers are those trained last, whatever becomes of their update.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import BinaryIO, Final

import structlog
from google.protobuf.message import DecodeError

from fedgrpc.codec.feedback import Keep, Residual
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.payload import Read, file_reader, verify_digest
from fedgrpc.errors import CodecError, FedgrpcError, LayoutError, StorageError, UsageError
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.storage.files import (
    UNFINISHED,
    RecycledFiles,
    WrittenBack,
    empty_folder,
    folder_size_bytes,
    is_gone,
    make_private,
    publish_folder,
    remove_folder,
    storage_errors,
    sweep,
    sync,
)
from fedgrpc.storage.residual_file import ResidualWriter, read_residual
from fedgrpc.v1 import aggregator_pb2

_PAYLOAD: Final = "payload"
_SIZES: Final = struct.Struct("<QQ")
_MAX_ABOUT_BYTES: Final = 64 << 20
_RESIDUAL: Final = "residual"
_PERSONAL: Final = "personal"
_KEPT: Final = "kept"
_BUFFER_BYTES: Final = 1 << 18

log = structlog.get_logger()

# Writes a payload and hands over the residual it leaves, tensor by tensor. Returns the header, and the layout of
# the residual (None: the previous residual stays current).
Fill = Callable[[BinaryIO, Keep], tuple[aggregator_pb2.UpdateHeader, Layout | None]]


@dataclass(frozen=True)
class SpooledUpdate:
    """One finished update on disk, ready to be sent."""

    folder: Path
    task: aggregator_pb2.Task
    header: aggregator_pb2.UpdateHeader

    @property
    def token(self) -> str:
        """The lease under which it is sent."""
        return self.header.token

    @property
    def size_bytes(self) -> int:
        """Bytes of the payload."""
        return self.header.manifest.size_bytes

    def is_of(self, run: str) -> bool:
        """Return whether the update may belong to the run of this id; an unknown one matches every run."""
        return not run or not self.task.run_id or self.task.run_id == run

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """Open the payload for reading by offset. Raises `StorageError`."""
        path = self.folder / _PAYLOAD
        with storage_errors(path), path.open("rb") as file:
            yield file_reader(file.fileno())


class Spool:
    """The updates in one folder. Not thread-safe: one owner, whose calls may run in a thread in turn."""

    def __init__(self, folder: Path, *, max_updates: int = 8, max_bytes: int = 8 << 30) -> None:
        self._folder = folder
        self._max_updates = max_updates
        self._max_bytes = max_bytes
        with storage_errors(folder):
            make_private(folder)
            sweep(folder)
            self._recycled = RecycledFiles(folder / "recycled", 1)
            self._recycled_residuals = RecycledFiles(folder / "recycled-residuals", 1)
        # Updates that this process has written, or has read through.
        self._sound: set[Path] = set()
        self._unsynced = False
        self.unreadable = 0

    def updates(self) -> list[SpooledUpdate]:
        """Return every update still to be sent, oldest first.

        `unreadable` then counts the others, which cannot be read now: a later call may return them. A corrupt
        update is dropped, with a line in the log. Those of a former process are read through once.
        """
        found = []
        self.unreadable = 0
        for folder in self._folders():
            try:
                found.append(self._checked(folder))
            except (DecodeError, CodecError) as error:
                self._drop_corrupt(folder, error)
            except OSError as error:
                if is_gone(error):
                    self._drop_corrupt(folder, error)
                    continue
                self.unreadable += 1
                log.warning("update cannot be read now", folder=str(folder), reason=str(error), kept=True)
        return found

    def _checked(self, folder: Path) -> SpooledUpdate:
        update = _load(folder)
        if folder not in self._sound:
            with (folder / _PAYLOAD).open("rb") as file:
                verify_digest(manifest_from_proto(update.header.manifest), file_reader(file.fileno()))
            self._sound.add(folder)
        return update

    def _drop_corrupt(self, folder: Path, error: Exception) -> None:
        log.warning("update dropped", folder=str(folder), reason=f"it is corrupt: {error}")
        with storage_errors(folder):
            self._keep_personal(folder)
            remove_folder(folder)

    def doubt(self, update: SpooledUpdate) -> None:
        """Mark an update that could not be read: `updates` then reads it through before returning it again."""
        self._sound.discard(update.folder)

    def count(self, run: str = "") -> int:
        """Return how many updates are still to be sent, in all or of one run."""
        return sum(1 for update in self.updates() if update.is_of(run)) if run else len(self._folders())

    def keep_for_later(self, updates: Iterable[SpooledUpdate], keep_s: float) -> None:
        """Keep updates of other runs for their own aggregators, until `keep_s` after they were written."""
        for update in updates:
            with storage_errors(update.folder):
                waited_s = time.time() - (update.folder / _PAYLOAD).stat().st_mtime
            if waited_s > keep_s:
                log.warning("update dropped", folder=str(update.folder), reason="its run has not been met again")
                self.drop(update)
            else:
                log.info(
                    "update kept", folder=str(update.folder), reason=f"it is of another run, {update.task.run_id}"
                )

    def write(
        self,
        task: aggregator_pb2.Task,
        fill: Fill,
        keep_personal: Callable[[Path], None] | None = None,
        keep: Callable[[Path], None] | None = None,
    ) -> SpooledUpdate:
        """Write an update, durable on return. `fill` writes payload and residual.

        `keep_personal` and `keep` write the files `personal` and `kept`.

        A full spool drops its oldest updates first: their rounds are long closed.

        Raises:
            StorageError: the disk is full or cannot be written; nothing half-written stays.
        """
        names = self._folders()
        number = int(names[-1].name) + 1 if names else 1
        unfinished, final = self._folder / f"{UNFINISHED}{number:08}", self._folder / f"{number:08}"
        with storage_errors(self._folder):
            empty_folder(unfinished)
            left = ResidualWriter(unfinished / _RESIDUAL, task.run_id or task.run, self._recycled_residuals)
            try:
                file = WrittenBack(self._recycled.create(unfinished / _PAYLOAD))
                with BufferedWriter(file, _BUFFER_BYTES) as payload:
                    header, layout = fill(payload, left.add)
                    about = header.SerializeToString(), task.SerializeToString()
                    payload.write(b"".join((*about, _SIZES.pack(*map(len, about)))))
                    payload.truncate()
                if layout is not None and (left.begun or (self._folder / _RESIDUAL).exists()):
                    # Without either, an empty residual would replace an empty one.
                    left.finish(layout)
                if keep_personal is not None:
                    keep_personal(unfinished / _PERSONAL)
                if keep is not None:
                    keep(unfinished / _KEPT)
                # Room is made only now that the size is known. Until the rename below nothing counts as spooled.
                self._make_room(folder_size_bytes(unfinished))
                publish_folder(unfinished, final)
            finally:
                left.close()
                sweep(self._folder)
        self._sound.add(final)
        return SpooledUpdate(final, task, header)

    def acknowledge(self, update: SpooledUpdate) -> None:
        """Remove an update that the aggregator has. Its residual becomes the current one."""
        with storage_errors(update.folder):
            # First: a crash in between then repeats the acknowledgement, instead of losing the residual.
            self._move_out(update.folder / _KEPT)
            self._move_out(update.folder / _RESIDUAL, self._recycled_residuals)
            self._remove(update)

    def drop(self, update: SpooledUpdate) -> None:
        """Remove an update that will never be taken. The previous residual stays current."""
        with storage_errors(update.folder):
            self._remove(update)

    def _remove(self, update: SpooledUpdate) -> None:
        self._sound.discard(update.folder)
        self._keep_personal(update.folder)
        self._recycled.keep(update.folder / _PAYLOAD)
        remove_folder(update.folder)

    def _keep_personal(self, folder: Path) -> None:
        """Save the personal layers of an update before it is removed."""
        self._move_out(folder / _PERSONAL)

    def _move_out(self, path: Path, recycled: RecycledFiles | None = None) -> None:
        """Move a file of an update beside the updates, durably on return.

        After a failed sync the file is moved already: the next call then repeats only the sync.
        """
        if path.exists():
            if recycled is not None:
                recycled.keep(self._folder / path.name)
            self._unsynced = True
            path.replace(self._folder / path.name)
        if self._unsynced:
            sync(self._folder)
            self._unsynced = False

    @property
    def personal(self) -> Path:
        """Path of the personal layers that the last training left; the file may not exist."""
        spooled = [folder / _PERSONAL for folder in reversed(self._folders())]
        return next((path for path in spooled if path.exists()), self._folder / _PERSONAL)

    def kept(self, run: str) -> Residual:
        """Return what the algorithm of `run` keeps on this device, in the form of a residual."""
        with storage_errors(self._folder):
            return read_residual(self._folder / _KEPT, run)

    def residual(self, run: str) -> Residual:
        """Return the residual that the next update of `run` starts from. Raises `StorageError`."""
        with storage_errors(self._folder):
            return read_residual(self._folder / _RESIDUAL, run)

    def _folders(self) -> list[Path]:
        with storage_errors(self._folder):
            # `glob` finds nothing in a folder that was deleted, instead of raising.
            return sorted(path for path in self._folder.glob("*") if path.name.isdigit())

    def _make_room(self, wanted_bytes: int) -> None:
        if wanted_bytes > self._max_bytes:
            raise StorageError(f"an update of {wanted_bytes} bytes is over the spool's {self._max_bytes}")
        held = {folder: folder_size_bytes(folder) for folder in self._folders()}
        for folder in list(held):
            if len(held) < self._max_updates and sum(held.values()) + wanted_bytes <= self._max_bytes:
                return
            log.warning("update dropped", folder=str(folder), reason="the spool is full")
            self._sound.discard(folder)
            self._keep_personal(folder)
            remove_folder(folder)
            del held[folder]


def _load(folder: Path) -> SpooledUpdate:
    texts, size_bytes = _read_about(folder / _PAYLOAD)
    header = aggregator_pb2.UpdateHeader.FromString(texts[0])
    task = aggregator_pb2.Task.FromString(texts[1])
    if manifest_from_proto(header.manifest).size_bytes != size_bytes:
        raise LayoutError(f"its payload has {size_bytes} bytes, declared are {header.manifest.size_bytes}")
    return SpooledUpdate(folder, task, header)


def _read_about(path: Path) -> tuple[tuple[bytes, bytes], int]:
    """Return header and task from the end of a payload's file, and the size of the payload itself."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size - _SIZES.size
        sizes = _SIZES.unpack(os.pread(file.fileno(), _SIZES.size, end)) if end >= 0 else (0, 0)
        size_bytes = end - sum(sizes)
        if size_bytes < 0 or max(sizes) > _MAX_ABOUT_BYTES:
            raise LayoutError("it is cut short")
        header_bytes, task_bytes = sizes
        header = os.pread(file.fileno(), header_bytes, size_bytes)
        return (header, os.pread(file.fileno(), task_bytes, size_bytes + header_bytes)), size_bytes


def check_folder(state_dir: Path, error: FedgrpcError) -> None:
    """Raise `UsageError` where no later try can succeed, because the state folder has been removed."""
    # Only the start creates the spool. Other folders are created again when they are needed.
    if isinstance(error, StorageError) and not (state_dir / "spool").exists():
        raise UsageError(f"the folder {state_dir} was removed while it was in use; start again") from error

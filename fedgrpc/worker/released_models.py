"""The versions that releases give to this device, for the applications beside it.

    released/RUN/release         the `StoredRelease`: which version is served, and which one was before
    released/RUN/00000007/       version 7: a model folder (fedgrpc.worker.model_folder), perhaps still a download

RUN is the run's id. The rule: what is served is whole and has matched the SHA-256 of its version, and a switch is
one rename. Whoever reads a version keeps it, however often the served one changes. The version before stays on the
disk, so that a release is taken back at once and without a link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from fedgrpc.errors import LayoutError
from fedgrpc.storage.files import is_gone, make_private, remove_folder, storage_errors, sweep, write_file
from fedgrpc.v1 import worker_pb2
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.model_folder import ModelFolder

_RECORD: Final = "release"
# The id names a folder, and comes from the aggregator.
_RUN_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_RUNS: Final = 64

log = structlog.get_logger()


@dataclass(frozen=True)
class ServedModel:
    """A released version that applications get; `model` is None while it is still being fetched."""

    run_id: str
    run: str
    version: int
    release: int
    model: HeldModel | None


class ReleasedModels:
    """The released versions of every run in one folder. One owner changes it; anybody may look."""

    def __init__(self, folder: Path) -> None:
        """Take up what a former process has left. Raises `StorageError`."""
        self._folder = folder
        self._records: dict[str, worker_pb2.StoredRelease] = {}
        self._folders: dict[tuple[str, int], ModelFolder] = {}
        with storage_errors(folder):
            make_private(folder)
            sweep(folder)
            for run in sorted(path for path in folder.iterdir() if path.is_dir()):
                self._load(run)

    def _load(self, run: Path) -> None:
        try:
            record = worker_pb2.StoredRelease.FromString((run / _RECORD).read_bytes())
        except DecodeError:
            log.warning("record of a release is damaged; it is fetched again", folder=str(run))
            return
        except OSError as error:
            if is_gone(error):
                return
            raise
        if record.run_id == run.name:
            self._records[run.name] = record
            for version in (record.version, record.previous):
                if version and self._place(run.name, version).exists():
                    self.folder_of(run.name, version)

    def _place(self, run_id: str, version: int) -> Path:
        return self._folder / run_id / f"{version:08}"

    def folder_of(self, run_id: str, version: int) -> ModelFolder:
        """Return the folder of a version, with its download. Raises `LayoutError` and `StorageError`."""
        if not _RUN_ID.fullmatch(run_id) or not 0 < version < 1 << 63:
            raise LayoutError(f"no run has the id {run_id[:80]!r}")
        others = {known for known, _ in self._folders} - {run_id}
        if len(others) >= _MAX_RUNS:
            raise LayoutError(f"this device serves the releases of {_MAX_RUNS} runs at most")
        key = run_id, version
        if key not in self._folders:
            with storage_errors(self._folder):
                make_private(self._folder / run_id)
            self._folders[key] = ModelFolder(self._place(run_id, version), with_identity=True)
        return self._folders[key]

    def whole(self, run_id: str, version: int) -> HeldModel | None:
        """Return a version that is here, whole; None: it is not, or was removed from the disk."""
        folder = self._folders.get((run_id, version))
        held = None if folder is None else folder.held
        return held if held is not None and held.version == version and held.folder.exists() else None

    def publish(self, run: str, run_id: str, version: int, release: int) -> None:
        """Serve a version that is here, whole; those before the last one are removed. Raises `StorageError`."""
        former = self._records.get(run_id)
        previous = 0
        if former is not None:
            previous = former.version if former.version != version else former.previous
        record = worker_pb2.StoredRelease(
            run_id=run_id, run=run, version=version, release=release, previous=previous
        )
        if record != former:
            with storage_errors(self._folder):
                write_file(self._folder / run_id / _RECORD, record.SerializeToString(deterministic=True))
            self._records[run_id] = record
        self._keep(run_id, {version, previous})

    def _keep(self, run_id: str, versions: set[int]) -> None:
        for key in [key for key in self._folders if key[0] == run_id and key[1] not in versions]:
            del self._folders[key]
        with storage_errors(self._folder):
            for path in (self._folder / run_id).iterdir():
                if path.name.isdigit() and int(path.name) not in versions:
                    remove_folder(path)

    def withdraw(self, run_id: str) -> None:
        """Serve no release of a run any more. Raises `StorageError`."""
        if self._records.pop(run_id, None) is None:
            return
        for key in [key for key in self._folders if key[0] == run_id]:
            del self._folders[key]
        with storage_errors(self._folder):
            if (self._folder / run_id).exists():
                remove_folder(self._folder / run_id)

    @property
    def run_ids(self) -> list[str]:
        """Ids of the runs with a release."""
        return list(self._records)

    def served(self, run: str = "") -> ServedModel | None:
        """Return what is served of a run, by its name or id, or of the only one with a release; None: nothing."""
        found = [each for each in self._records.values() if run in ("", each.run, each.run_id)]
        if len(found) != 1:
            return None
        (record,) = found
        about = record.run_id, record.run, record.version, record.release
        return ServedModel(*about, self.whole(record.run_id, record.version))

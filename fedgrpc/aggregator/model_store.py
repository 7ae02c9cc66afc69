"""Model versions on disk, each with the state that the server optimizer keeps after it.

models/000007.safetensors       version 7
optimizer/000007.safetensors    state of the server optimizer after version 7

The rule: a file is written under another name, and whole before it has its own. A version counts once the database
knows it, so a file without a row is what a crash has left of a commit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from fedgrpc.codec.layout import Array
from fedgrpc.errors import NotFound, StorageError, UsageError
from fedgrpc.storage.files import RecycledFiles, make_private, storage_errors, sync
from fedgrpc.storage.model_file import ModelFile, ModelTensors

_VERSION: Final = re.compile(r"(\d+)(-|\.safetensors$)")
# One version is written at a time. Overwriting a file is faster than making one: its blocks are allocated.
_MAX_RECYCLED: Final = 1


class ModelStore:
    """The versions in a data folder."""

    def __init__(self, data_dir: Path) -> None:
        """Take up what a former process has left. Raises OSError."""
        # The last one opened: a round asks for its base again and again.
        self._opened: tuple[tuple[int, ...], ModelFile] | None = None
        self._models = data_dir / "models"
        self._optimizer_states = data_dir / "optimizer"
        for folder in (self._models, self._optimizer_states):
            make_private(folder)
        self.recycled = RecycledFiles(self._models / "recycled", _MAX_RECYCLED)

    def path(self, version: int) -> Path:
        """Return the path of the file of `version`, which may not exist yet."""
        return self._models / f"{version:06d}.safetensors"

    def optimizer_state_path(self, version: int) -> Path:
        """Return the path of the server optimizer's state after `version`, which may not exist yet."""
        return self._optimizer_states / f"{version:06d}.safetensors"

    def versions(self) -> list[int]:
        """Return the versions whose files are here, in order. Raises `StorageError`."""
        with storage_errors(self._models, "read"):
            found = (version_of(path) for path in self._models.iterdir() if path.is_file())
            return sorted(version for version in found if version is not None)

    def open(self, version: int) -> ModelFile:
        """Return the file of a version. Raises `NotFound`, and `StorageError` when it is damaged."""
        path = self.path(version)
        try:
            about = path.stat()
        except FileNotFoundError:
            raise NotFound(f"there is no model version {version} here") from None
        except OSError as error:
            raise StorageError(f"cannot read the model {path}: {error.strerror}") from error
        # The file may be another one: a commit that was cut off writes the same version again.
        signature = (version, about.st_ino, about.st_size, about.st_mtime_ns)
        if self._opened is None or self._opened[0] != signature:
            self._opened = (signature, _open(path))
        return self._opened[1]

    def open_optimizer_state(self, version: int) -> ModelFile | None:
        """Return the server optimizer's state after `version`; None where it keeps none."""
        path = self.optimizer_state_path(version)
        return _open(path) if path.exists() else None

    def forget_optimizer_state(self) -> None:
        """Remove the state of a server optimizer: another one would read it wrong. Raises `StorageError`."""
        with storage_errors("the server optimizer's state", "remove"):
            for path in self._optimizer_states.iterdir():
                path.unlink(missing_ok=True)
            # Durable before the run continues: after a power cut another optimizer would find it again.
            sync(self._optimizer_states)

    def check(self, version: int) -> None:
        """Raise `StorageError` unless a version, and what the server optimizer keeps, are as they were written.

        Raises as `open` too.
        """
        # Both: the optimizer steps from this state, and a damaged one would spoil every later version.
        check_as_written(self.open(version))
        if (state := self.open_optimizer_state(version)) is not None:
            check_as_written(state)

    def tensors(self, version: int) -> Mapping[str, Array]:
        """Return the tensors of `version` by name, each read when it is asked for. Raises as `open`."""
        return ModelTensors(self.open(version))

    def prune(self, keep: frozenset[int], models: frozenset[int], pulled: Collection[int]) -> None:
        """Remove all of every version that is not in `keep`; the model itself stays if in `models`.

        The files of `pulled` are still read, and so are not written over. Raises `StorageError`.
        """
        with storage_errors("an old model", "remove"):
            for path in outdated(self._models, keep | models):
                # A stream reads on from a removed file that it has open, but not from one that is overwritten.
                if version_of(path) in pulled:
                    path.unlink(missing_ok=True)
                else:
                    self.recycled.keep(path)
            # The best version is kept for its model. Training continues from the last one only.
            for path in outdated(self._optimizer_states, keep):
                path.unlink(missing_ok=True)


def version_of(path: Path) -> int | None:
    """Return the version in a file's name; None for a name without."""
    found = _VERSION.match(path.name)
    return int(found[1]) if found else None


def outdated(folder: Path, keep: frozenset[int]) -> list[Path]:
    """Return the files of versions that are not in `keep`. Raises OSError."""
    return [path for path in folder.iterdir() if version_of(path) not in (None, *keep)]


def _open(path: Path) -> ModelFile:
    try:
        return ModelFile.open(path)
    except UsageError as error:
        raise StorageError(str(error)) from error


def check_as_written(model: ModelFile) -> None:
    """Raise `StorageError` for a file that has changed: nothing is made of it."""
    if not model.as_written:
        raise StorageError(
            f"{model.path} is corrupt: it has changed on the disk since it was written; restore it from a copy"
        )

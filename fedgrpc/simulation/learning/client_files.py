"""Files that simulated devices keep on the disk, in the formats of a worker.

    clients/NAME/residual, personal, kept    what the next task starts from (fedgrpc.storage.residual_file)
    clients/NAME/next.*, payload       the update of the task in progress, and what it leaves behind
    clients/NAME/ended.personal        personal layers of a task that ended in this round without its update
    models/VERSION-DIGEST-SUBMODEL/    a model as devices hold it, once for all that have pulled the same payloads

The rule: an update's residual, and what the run's algorithm keeps, become the current ones when the update is
accepted, as in a worker's spool, and here only once the end of its round is noted. So a round that is played again
starts from the same files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedgrpc.aggregator.payload_encoder import EncodedModel
from fedgrpc.codec.chunk import chunks
from fedgrpc.codec.feedback import Residual
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.residual_file import read_residual
from fedgrpc.v1.aggregator_pb2 import PullModelResponse
from fedgrpc.worker.held_model import HeldModel, Source
from fedgrpc.worker.model_folder import ModelFolder


@dataclass(frozen=True)
class HeldKey:
    """A model as devices hold it: version, SHA-256 of the payload that made it, and name of the sub-model."""

    version: int
    digest: str
    sub_model: str = ""

    @property
    def held(self) -> tuple[int, bytes]:
        """Version and digest, as a device tells them to the aggregator."""
        return self.version, bytes.fromhex(self.digest)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.version:06d}-{self.digest}-{self.sub_model or 'whole'}"


class ClientFiles:
    """The files of one device in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def exist(self) -> bool:
        """True if the device has kept anything."""
        return self._folder.exists()

    @property
    def payload(self) -> Path:
        """Payload of the update in progress."""
        return self._folder / "payload"

    @property
    def next_residual(self) -> Path:
        """Residual that the update in progress leaves."""
        return self._folder / "next.residual"

    @property
    def next_personal(self) -> Path:
        """Personal layers that were trained with the update in progress."""
        return self._folder / "next.personal"

    @property
    def next_kept(self) -> Path:
        """State of the algorithm that the update in progress leaves."""
        return self._folder / "next.kept"

    @property
    def personal(self) -> Path:
        """Personal layers as they were trained last."""
        return self._ended if self._ended.exists() else self._folder / "personal"

    @property
    def _ended(self) -> Path:
        return self._folder / "ended.personal"

    @property
    def has_residual(self) -> bool:
        """True if an accepted update has left a residual."""
        return (self._folder / "residual").exists()

    def residual(self, run: str) -> Residual:
        """Return the residual that the next update of `run` starts from."""
        return read_residual(self._folder / "residual", run)

    def kept(self, run: str) -> Residual:
        """Return what the algorithm of `run` keeps here."""
        return read_residual(self._folder / "kept", run)

    def begin(self) -> None:
        """Drop what an update left that was not accepted."""
        # Most devices of most experiments keep nothing: then there is no folder, and one look tells.
        if self.exist:
            for path in (self.payload, self.next_residual, self.next_personal, self.next_kept):
                path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Drop what a round has left whose end was not noted."""
        self.begin()
        self._ended.unlink(missing_ok=True)

    def end(self) -> None:
        """End a task without its update, in the round in progress: its personal layers stay."""
        if self.next_personal.exists():
            self.next_personal.replace(self._ended)
        self.begin()

    def open_payload(self) -> BinaryIO:
        """Open the file of the payload, to write it."""
        self.make_folder()
        return self.payload.open("wb")

    def make_folder(self) -> None:
        """Make the folder, for what is written next."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def settle(self, accepted: bool) -> None:
        """Take what the device's tasks of a round have left: personal layers, and with an update all else.

        It may be done once more after it was cut off.
        """
        if not self.exist:
            return
        for path in (self._ended, self.next_personal):
            if path.exists():
                path.replace(self._folder / "personal")
        for path, name in ((self.next_residual, "residual"), (self.next_kept, "kept")):
            if accepted and path.exists():
                path.replace(self._folder / name)
            path.unlink(missing_ok=True)
        self.payload.unlink(missing_ok=True)


class HeldModels:
    """Models as devices hold them, received by the code of a worker, once for all who pull the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Those that are known to be there.
        self._paths: dict[HeldKey, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: HeldKey) -> Path:
        """Return the folder of a model."""
        return self._paths.get(key) or self._folder / key.folder

    def receive(self, encoded: EncodedModel, source: Source, base: HeldKey | None) -> HeldKey:
        """Decode a payload, perhaps a difference to `base`, unless that was done. Raises as a worker does."""
        if encoded.payload is None:
            assert base is not None, "a worker that holds nothing is sent something"
            return base
        key = HeldKey(source.version, encoded.manifest.digest.hex(), source.sub_model)
        if key not in self._paths and not (final := self.path(key)).exists():
            scratch = self._folder / "receiving"
            with storage_errors(self._folder):
                shutil.rmtree(scratch, ignore_errors=True)
                if encoded.base_version:
                    assert base is not None, "a difference comes to who holds its base"
                    # A copy: a worker's folder writes over the model that a new one replaces.
                    shutil.copytree(self.path(base), scratch / "00000001")
                held = _received(ModelFolder(scratch), encoded, source)
                held.folder.rename(final)
                shutil.rmtree(scratch)
        self._paths.setdefault(key, self.path(key))
        return key

    def keep_only(self, wanted: Iterable[HeldKey]) -> None:
        """Remove all others."""
        wanted = set(wanted)
        names = {key.folder for key in wanted}
        self._paths = {key: path for key, path in self._paths.items() if key in wanted}
        for path in self._folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)


def _received(folder: ModelFolder, encoded: EncodedModel, source: Source) -> HeldModel:
    assert encoded.payload is not None
    header = PullModelResponse.FromString(encoded.header).header
    partial = folder.open_partial(source, header, 0)
    try:
        partial.append(list(chunks(encoded.payload.read, encoded.manifest.size_bytes)))
        return folder.finish(partial)
    finally:
        partial.close()

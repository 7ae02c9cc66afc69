"""One complete model version on the device's disk, and how its tensors are read.

    about.json       run, version and sub-model; of a model that came as a difference its origin and CRC-32
    header.pb        the `ModelHeader` with the manifest of the payload
    payload          the tensors
    payload.raw      the same in the raw recipe, with header.raw.pb, once somebody has pulled it

The rule: a version is never changed once its folder has its number. Mapped weights and open streams of it stay
readable after a newer version has replaced it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.layout import Array
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import (
    LazyTensors,
    PayloadReader,
    buffer_reader,
    file_reader,
    verify_digest,
    write_payload,
)
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import CorruptError, LayoutError
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.storage.files import UNFINISHED, storage_errors
from fedgrpc.v1 import aggregator_pb2, tensor_pb2
from fedgrpc.worker.delta import NO_DIGEST

HEADER: Final = "header.pb"
PAYLOAD: Final = "payload"
_ABOUT: Final = "about.json"
_RAW: Final = "payload.raw"
_RAW_HEADER: Final = "header.raw.pb"
_RAW_RECIPE: Final = Recipe(Raw())
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Source:
    """Identity of a model: run, version and sub-model ("": the whole model)."""

    run: str
    version: int
    sub_model: str = ""


@dataclass(frozen=True)
class Origin:
    """Digest and size of the payload that made a model. By these the aggregator knows exactly what is held."""

    sha256: bytes
    size_bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> Origin:
        """Return the origin that `manifest` declares."""
        return cls(manifest.sha256, manifest.size_bytes)


@dataclass(frozen=True)
class HeldModel:
    """One complete model version on disk. `origin` is the payload that made it, perhaps a difference.

    `crc32` is that of the stored payload. None: an earlier process pulled it, and it has the digest of its
    manifest.
    """

    folder: Path
    source: Source
    manifest: Manifest
    origin: Origin
    crc32: int | None = None
    _uses: list[weakref.ref[Any]] = field(default_factory=list, compare=False, repr=False)
    _writing: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @classmethod
    def load(cls, folder: Path) -> HeldModel:
        """Return the version in a folder. Raises OSError, and others for a damaged one."""
        header = aggregator_pb2.ModelHeader.FromString((folder / HEADER).read_bytes())
        manifest = manifest_from_proto(header.manifest)
        if (folder / PAYLOAD).stat().st_size != manifest.size_bytes:
            raise LayoutError("its payload is not as long as declared")
        source, origin, crc = read_about(folder)
        # The raw copy was written without a sync: a power cut may have left part of it. Write it again when asked.
        (folder / _RAW_HEADER).unlink(missing_ok=True)
        return cls(folder, source, manifest, origin or Origin.of(manifest), crc)

    @property
    def in_use(self) -> bool:
        """Whether somebody still reads the payload: weights that are mapped from it, or a stream."""
        return any(use() is not None for use in self._uses)

    @property
    def version(self) -> int:
        """Its number in the run."""
        return self.source.version

    def weights(self) -> dict[str, Array]:
        """Return all tensors, each writable and shared with nobody. Slow: run it in a thread.

        Tensors that are stored as they are in memory are mapped, and only pages that are written to are copied.
        """
        content = self.mapped()
        self._note_use(content)
        reader = PayloadReader(self.manifest, buffer_reader(content.data), valid=True)
        return {spec.name: _own(array) for spec, array in reader}

    def mapped(self) -> Array:
        """Return the payload's bytes, mapped. Writes to them do not reach the file."""
        path = self.folder / PAYLOAD
        with storage_errors(path):
            return np.memmap(path, np.uint8, "c") if self.manifest.size_bytes else np.empty(0, np.uint8)

    def tensors(self) -> Mapping[str, Array]:
        """Return all tensors, each read on access, also once a newer version is held.

        Raises `StorageError`, and so does each access.
        """
        path = self.folder / PAYLOAD
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        at = file_reader(descriptor)

        def read(offset: int, size: int) -> bytes:
            with storage_errors(path):
                return bytes(at(offset, size))

        weakref.finalize(read, os.close, descriptor)
        self._note_use(read)
        return LazyTensors(PayloadReader(self.manifest, read))

    def check(self) -> None:
        """Raise CorruptError unless the payload is what was written. Slow: run it in a thread."""
        with self._open(self.folder / PAYLOAD) as file:
            read = file_reader(file.fileno())
            if self.crc32 is None:
                return verify_digest(self.manifest, read)
            crc = 0
            for offset in range(0, self.manifest.size_bytes, _READ_BYTES):
                crc = crc32(read(offset, min(_READ_BYTES, self.manifest.size_bytes - offset)), crc)
        if crc != self.crc32:
            raise CorruptError("its payload is not what was written")

    def open_raw(self) -> tuple[Manifest, BinaryIO]:
        """Return manifest and file of the weights in the raw recipe, written once. Slow: run it in a thread."""
        with self._writing:
            manifest, path = self._raw()
            return manifest, self._open(path)

    def _open(self, path: Path) -> BinaryIO:
        with storage_errors(path):
            file = path.open("rb")
        self._note_use(file)
        return file

    def _note_use(self, reader: Any) -> None:
        self._uses[:] = [use for use in self._uses if use() is not None] + [weakref.ref(reader)]

    def _raw(self) -> tuple[Manifest, Path]:
        plain = self.manifest.compression == "none" and all(e.encoding == Raw() for e in self.manifest.entries)
        if plain and self.manifest.sha256 != NO_DIGEST:
            return self.manifest, self.folder / PAYLOAD
        path, header = self.folder / (PAYLOAD if plain else _RAW), self.folder / _RAW_HEADER
        with storage_errors(path):
            if not header.exists():
                manifest = self._digested() if plain else self._write_raw(path)
                header.write_bytes(manifest_to_proto(manifest).SerializeToString())
            return _read_manifest(header), path

    def _digested(self) -> Manifest:
        return replace(self.manifest, sha256=hashlib.sha256(self.mapped().data).digest())

    def _write_raw(self, path: Path) -> Manifest:
        unfinished = self.folder / (UNFINISHED + _RAW)
        with unfinished.open("wb") as file:
            layout = self.manifest.layout
            manifest = write_payload(self.weights(), _RAW_RECIPE, file, np.random.default_rng(0), layout)
        unfinished.replace(path)
        return manifest


def _read_manifest(path: Path) -> Manifest:
    return manifest_from_proto(tensor_pb2.Manifest.FromString(path.read_bytes()))


def _own(array: Array) -> Array:
    """Return an aligned array that a trainer may change: decoded tensors may be read-only views of a frame."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and flags.writeable:
        return array
    return np.require(array, requirements=["C", "A", "W"])


def write_about(folder: Path, source: Source, origin: Origin | None = None, crc: int | None = None) -> None:
    """Write about.json: the source of a model, and of one that came as a difference its origin and CRC-32."""
    about = asdict(source)
    if origin is not None:
        about |= {"origin_sha256": origin.sha256.hex(), "origin_bytes": origin.size_bytes}
    if crc is not None:
        about["crc32"] = crc
    (folder / _ABOUT).write_text(json.dumps(about))


def read_about(folder: Path) -> tuple[Source, Origin | None, int | None]:
    """Read what `write_about` wrote. Raises OSError, ValueError, KeyError and TypeError."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
    except RecursionError as error:
        raise ValueError(f"{_ABOUT} is nested too deep") from error
    if not isinstance(about, dict):
        raise ValueError(f"{_ABOUT} is no JSON object")
    sub_model = str(about.get("sub_model", ""))
    source = Source(str(about["run"]), int(about["version"]), sub_model)
    if "origin_sha256" not in about:
        return source, None, None
    crc = int(about["crc32"]) if "crc32" in about else None
    return source, Origin(bytes.fromhex(about["origin_sha256"]), int(about["origin_bytes"])), crc

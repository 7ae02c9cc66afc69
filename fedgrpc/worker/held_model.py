"""One complete model version on the device's disk, and how its tensors are read.

    model.pb         the `StoredModel`: run, version, sub-model, and the manifest of the payload
    payload          the tensors
    payload.raw      the same in the raw recipe, with header.raw.pb, once it has been pulled

The rule: a version is never changed once its folder has its number. Mapped weights and open streams of it stay
readable after a newer version has replaced it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.digest import digest_of, new_digest
from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import (
    LazyTensors,
    PayloadReader,
    buffer_reader,
    file_reader,
    write_payload,
)
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import CorruptError, LayoutError
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.storage.files import UNFINISHED, read_pieces, storage_errors
from fedgrpc.v1 import tensor_pb2, worker_pb2
from fedgrpc.worker.delta import NO_DIGEST

RECORD: Final = "model.pb"
PAYLOAD: Final = "payload"
_RAW: Final = "payload.raw"
_RAW_HEADER: Final = "header.raw.pb"
_RAW_RECIPE: Final = Recipe(Raw())


@dataclass(frozen=True)
class Source:
    """Identity of a model: run, version and sub-model ("": the whole model)."""

    run: str
    version: int
    sub_model: str = ""

    @classmethod
    def of(cls, record: worker_pb2.StoredModel) -> Source:
        """Return the identity in the record of a model or of a download."""
        return cls(record.run_id, record.header.version, record.sub_model)


@dataclass(frozen=True)
class HeldModel:
    """One complete model version on disk; `manifest` is that of its record."""

    folder: Path
    record: worker_pb2.StoredModel
    manifest: Manifest
    _uses: list[weakref.ref[Any]] = field(default_factory=list, compare=False, repr=False)
    _writing: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @classmethod
    def load(cls, folder: Path) -> HeldModel:
        """Return the version in a folder. Raises OSError, DecodeError and CodecError."""
        record = worker_pb2.StoredModel.FromString((folder / RECORD).read_bytes())
        manifest = manifest_from_proto(record.header.manifest)
        if (folder / PAYLOAD).stat().st_size != manifest.size_bytes:
            raise LayoutError("its payload is not as long as declared")
        # The raw copy was written without a sync: a power cut may have left part of it. Write it again when asked.
        (folder / _RAW_HEADER).unlink(missing_ok=True)
        return cls(folder, record, manifest)

    @property
    def source(self) -> Source:
        """Run, version and sub-model."""
        return Source.of(self.record)

    @property
    def origin_digest(self) -> bytes:
        """Digest of the payload that made it, perhaps a difference. By it the aggregator knows what is held."""
        return self.record.origin_digest or self.manifest.digest

    @property
    def in_use(self) -> bool:
        """True while the payload is still read: by weights that are mapped from it, or by a stream."""
        return any(use() is not None for use in self._uses)

    @property
    def version(self) -> int:
        """Number of the version in the run."""
        return self.record.header.version

    def weights(self) -> dict[str, Array]:
        """Return all tensors, each writable and not shared. Slow: run it in a thread.

        Tensors that are stored as they are in memory are mapped, and only pages that are written to are copied.
        """
        return {spec.name: _own(array) for spec, array in self.each()}

    def each(self) -> Iterator[tuple[TensorSpec, Array]]:
        """Yield all tensors in order, one in memory at a time. They are not to be changed."""
        content = self.mapped()
        self._note_use(content)
        yield from PayloadReader(self.manifest, buffer_reader(content.data), valid=True)

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
        summed, crc, digest = self.record.HasField("crc32"), 0, new_digest()
        path = self.folder / PAYLOAD
        with self._open(path) as file, storage_errors(path, "read"):
            for piece in read_pieces(file.fileno(), 0, self.manifest.size_bytes):
                if summed:
                    crc = crc32(piece, crc)
                else:
                    digest.update(piece)
        if (crc != self.record.crc32) if summed else (digest.digest() != self.manifest.digest):
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
        if plain and self.manifest.digest != NO_DIGEST:
            return self.manifest, self.folder / PAYLOAD
        path, header = self.folder / (PAYLOAD if plain else _RAW), self.folder / _RAW_HEADER
        with storage_errors(path):
            if not header.exists():
                manifest = self._digested() if plain else self._write_raw(path)
                header.write_bytes(manifest_to_proto(manifest).SerializeToString())
            return _read_manifest(header), path

    def _digested(self) -> Manifest:
        return replace(self.manifest, digest=digest_of(self.mapped().data))

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

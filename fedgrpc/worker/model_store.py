"""The model version that the device holds, and the download of the next one.

    model/00000003/    the held version: about.json, header.pb, payload
    model/partial/     a download that can resume

The rule: a folder with a number is complete and its payload has matched its digest. Weights that came as a
difference are stored whole, so that the held version never depends on another. Their about.json has a CRC-32, and
their digest is computed when somebody pulls them. Nothing here is synced to the disk: what a power cut takes away
can be pulled again, and what it leaves is checked at the next start.
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
from typing import Any, BinaryIO, Final, NoReturn

import numpy as np
import structlog
from google.protobuf.message import DecodeError

from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.layout import Array, TensorRole
from fedgrpc.codec.manifest import Limits, Manifest, TensorEntry
from fedgrpc.codec.payload import (
    LazyTensors,
    PayloadReader,
    buffer_reader,
    file_reader,
    naming,
    verify_digest,
    write_payload,
)
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.values import PIECE, part_of, pieces, refuse_non_finite
from fedgrpc.errors import CodecError, CorruptError, LayoutError, StorageError
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.storage.files import (
    UNFINISHED,
    RecycledFiles,
    empty_folder,
    is_gone,
    make_private,
    remove_folder,
    storage_errors,
    sweep,
)
from fedgrpc.v1 import aggregator_pb2, tensor_pb2
from fedgrpc.worker.delta import Applied
from fedgrpc.worker.partial import HEADER, PAYLOAD, PartialModel, received_bytes

_ABOUT: Final = "about.json"
_RAW: Final = "payload.raw"
_RAW_HEADER: Final = "header.raw.pb"
_RAW_RECIPE: Final = Recipe(Raw())
_NO_DIGEST: Final = bytes(32)
_PIECE: Final = 2 * PIECE
_READ_BYTES: Final = 1 << 20

log = structlog.get_logger()


@dataclass(frozen=True)
class Source:
    """Origin of a model: run, version, recipe of the payload, and slice ("": the whole model)."""

    run: str
    version: int
    recipe: str
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
        if plain and self.manifest.sha256 != _NO_DIGEST:
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


def _write_whole(model: Applied, out: BinaryIO) -> tuple[Manifest, int]:
    """Write all tensors raw. Return their manifest, without a digest, and the CRC-32 of the payload."""
    crc = 0
    for spec in model.layout:
        part = part_of(model, spec.name)
        for piece in pieces(spec.size, _PIECE):
            values = part(piece.start, piece.stop)
            if spec.is_trained:
                with naming(spec):
                    refuse_non_finite(values)
            data = values.view(np.uint8).data
            crc = crc32(data, crc)
            out.write(data)
    entries = tuple(TensorEntry(spec, Raw(), spec.nbytes) for spec in model.layout)
    return Manifest(entries, "none", (), sum(spec.nbytes for spec in model.layout), _NO_DIGEST), crc


def _own(array: Array) -> Array:
    """Return an aligned array that a trainer may change: decoded tensors may be read-only views of a frame."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and flags.writeable:
        return array
    return np.require(array, requirements=["C", "A", "W"])


class ModelFolder:
    """The held version and, if it `has_partial`, the partial download in one folder. One owner."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self._folder = folder
        self._limits = limits or Limits()
        self._partial = folder / "partial"
        with storage_errors(folder):
            make_private(folder)
            sweep(folder)
            # Two sets of recycled files, since a difference is small and whole weights are large.
            self._recycled = RecycledFiles(folder / "spare", 1)
            self._recycled_differences = RecycledFiles(folder / "spare-differences", 1)
            self.has_partial = self._partial.exists()
        self.held = self._load_held()

    def forget_other_runs(self, run: str) -> None:
        """Drop a model of another run: version numbers mean nothing across runs."""
        if self.held is not None and self.held.source.run != run:
            with storage_errors(self._folder):
                remove_folder(self.held.folder)
            self.held = None

    def partial_size_bytes(self, source: Source) -> int:
        """Return the bytes of an interrupted download of `source`; 0 when there is none."""
        try:
            if _read_source(self._partial) == source:
                return received_bytes(self._partial)
        except OSError as error:
            if not is_gone(error):
                raise StorageError(f"cannot read {self._partial}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            pass
        else:
            return 0
        self.drop_partial()
        return 0

    def drop_partial(self) -> None:
        """Remove the partial download, so that the next one starts at its first byte."""
        with storage_errors(self._partial):
            if self._partial.exists():
                remove_folder(self._partial)
        self.has_partial = False

    def open_partial(self, source: Source, header: aggregator_pb2.ModelHeader, offset: int) -> PartialModel | None:
        """Open the download for a stream that starts at `offset`; None when the bytes kept do not fit the stream.

        Raises:
            LayoutError, TooLargeError: the header's manifest is refused.
        """
        with storage_errors(self._partial):
            if not offset:
                self._start_partial(source, header)
            recycled = self._recycled_differences if header.base_version else self._recycled
            partial = PartialModel(self._partial, header, self._limits, recycled)
        if partial.size_bytes != offset:
            partial.close()
            return None
        return partial

    def _start_partial(self, source: Source, header: aggregator_pb2.ModelHeader) -> None:
        manifest = manifest_from_proto(header.manifest, self._limits)
        self._check_layout(source, manifest, header.base_version > 0)
        self.drop_partial()
        unfinished = empty_folder(self._folder / (UNFINISHED + "partial"))
        _write_about(unfinished, source)
        unfinished.rename(self._partial)
        self.has_partial = True

    def _check_layout(self, source: Source, manifest: Manifest, is_difference: bool) -> None:
        """Raise `LayoutError` unless the version has the tensors of the held one, which fits this device.

        A difference may leave out tensors that are no parameters.
        """
        held = self.held
        if held is None or (held.source.run, held.source.sub_model) != (source.run, source.sub_model):
            return
        given, known = set(manifest.layout), set(held.manifest.layout)
        due = {spec for spec in known if spec.role is TensorRole.PARAMETER} if is_difference else known
        if not due <= given <= known:
            raise LayoutError(f"version {source.version} has not the tensors of version {held.version}")

    def finish(self, partial: PartialModel) -> HeldModel:
        """Verify the download and make it the held version. Slow: run it in a thread.

        Raises:
            CorruptError: it is not whole or does not match its digest; the partial download is gone.
            LayoutError: it is a difference to a version that is not held.
        """
        try:
            partial.finish()
        except CorruptError:
            self.drop_partial()
            raise
        manifest, crc = partial.manifest, partial.crc32
        with storage_errors(self._folder):
            source = _read_source(self._partial)
            if partial.header.base_version:
                manifest, crc = self._merge(partial)
            final = self._folder / f"{self._next_number():08}"
            self._partial.rename(final)
        self.has_partial = False
        old, self.held = self.held, HeldModel(final, source, manifest, Origin.of(partial.manifest), crc)
        if old is not None:
            with storage_errors(old.folder):
                if not old.in_use:
                    self._recycled.keep(old.folder / PAYLOAD)
                remove_folder(old.folder)
        return self.held

    def _merge(self, partial: PartialModel) -> tuple[Manifest, int]:
        """Turn the difference in the partial download into the whole model. Return its manifest and CRC-32."""
        base = self.held
        if base is None or base.version != partial.header.base_version:
            self.drop_partial()
            raise LayoutError(f"the model came as a difference to version {partial.header.base_version}, not held")
        self.check_held()
        merged = empty_folder(self._folder / (UNFINISHED + "merged"))
        with (self._partial / PAYLOAD).open("rb") as file:
            difference = PayloadReader(partial.manifest, file_reader(file.fileno()), self._limits)
            held = PayloadReader(base.manifest, buffer_reader(base.mapped().data))
            with open(self._recycled.create(merged / PAYLOAD), "wb") as payload:
                manifest, crc = _write_whole(Applied(held, difference), payload)
                payload.truncate()
        if partial.header.HasField("held_crc32") and partial.header.held_crc32 != crc:
            self._drop_held("what it becomes is not what the aggregator takes it for")
        header = aggregator_pb2.ModelHeader(version=partial.header.version, manifest=manifest_to_proto(manifest))
        (merged / HEADER).write_bytes(header.SerializeToString(deterministic=True))
        _write_about(merged, _read_source(self._partial), Origin.of(partial.manifest), crc)
        self._recycled_differences.keep(self._partial / PAYLOAD)
        self.drop_partial()
        merged.rename(self._partial)
        self.has_partial = True
        return manifest, crc

    def check_held(self) -> None:
        """Raise CorruptError if the held model has changed on the disk. It is dropped then, to be pulled whole."""
        if self.held is None:
            return
        if not self.held.folder.exists():
            self._drop_held("its folder is gone")
        try:
            self.held.check()
        except CorruptError as error:
            self._drop_held(str(error))

    def _drop_held(self, why: str) -> NoReturn:
        """Drop the held model and the partial download, which may be a difference to it. Raises CorruptError."""
        assert self.held is not None
        log.warning("held model dropped", folder=str(self.held.folder), reason=why)
        held, self.held = self.held, None
        with storage_errors(self._folder):
            if held.folder.exists():
                remove_folder(held.folder)
        self.drop_partial()
        raise CorruptError(f"the held model version {held.version} has changed on the disk: {why}")

    def _next_number(self) -> int:
        return max((int(path.name) for path in self._numbered()), default=0) + 1

    def _numbered(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*") if path.name.isdigit())

    def _load_held(self) -> HeldModel | None:
        """Return the newest complete version. Remove older ones, left by a crash, and damaged ones.

        A version that cannot be read now stays for the next start. This process pulls it again.
        """
        held: HeldModel | None = None
        for folder in reversed(self._numbered()):
            if held is None:
                try:
                    whole = _load(folder)
                    whole.check()
                    held = whole
                    continue
                except (OSError, ValueError, KeyError, TypeError, DecodeError, CodecError, StorageError) as error:
                    if isinstance(error, StorageError) or (isinstance(error, OSError) and not is_gone(error)):
                        log.warning("held model cannot be read now", folder=str(folder), reason=str(error))
                        return None
                    log.warning("held model dropped", folder=str(folder), reason=str(error))
            remove_folder(folder)
        return held


def _load(folder: Path) -> HeldModel:
    header = aggregator_pb2.ModelHeader.FromString((folder / HEADER).read_bytes())
    manifest = manifest_from_proto(header.manifest)
    if (folder / PAYLOAD).stat().st_size != manifest.size_bytes:
        raise LayoutError("its payload is not as long as declared")
    source, origin, crc = _read_about(folder)
    # The raw copy was written without a sync: a power cut may have left part of it. Write it again when asked.
    (folder / _RAW_HEADER).unlink(missing_ok=True)
    return HeldModel(folder, source, manifest, origin or Origin.of(manifest), crc)


def _write_about(folder: Path, source: Source, origin: Origin | None = None, crc: int | None = None) -> None:
    about = asdict(source)
    if origin is not None:
        about |= {"origin_sha256": origin.sha256.hex(), "origin_bytes": origin.size_bytes}
    if crc is not None:
        about["crc32"] = crc
    (folder / _ABOUT).write_text(json.dumps(about))


def _read_about(folder: Path) -> tuple[Source, Origin | None, int | None]:
    try:
        about = json.loads((folder / _ABOUT).read_text())
    except RecursionError as error:
        raise ValueError(f"{_ABOUT} is nested too deep") from error
    if not isinstance(about, dict):
        raise ValueError(f"{_ABOUT} is no JSON object")
    sub_model = str(about.get("sub_model", ""))
    source = Source(str(about["run"]), int(about["version"]), str(about["recipe"]), sub_model)
    if "origin_sha256" not in about:
        return source, None, None
    crc = int(about["crc32"]) if "crc32" in about else None
    return source, Origin(bytes.fromhex(about["origin_sha256"]), int(about["origin_bytes"])), crc


def _read_source(folder: Path) -> Source:
    return _read_about(folder)[0]

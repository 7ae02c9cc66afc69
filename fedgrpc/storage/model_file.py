"""Model files in the safetensors format (https://huggingface.co/docs/safetensors), one tensor at a time.

The safetensors package writes only whole models from memory; an aggregator holds one tensor at a time, so that
its memory does not grow with the model. Files written here are read by that package, and the other way round.

The tensors of a file, end to end, are also the payload of the model in the raw recipe. So its header keeps their
SHA-256, and the digest of the whole file is that of the header and this. Beside it is their CRC-32, which costs a
fraction, and is checked whenever something is decided by the file. A file that never travels has this alone.

What the format has no place for is in its metadata, which holds text alone: `roles` is a JSON object of roles by
name, without those that names tell, and `tied` one of lists of tied names. A version has each tied tensor again
under those names, behind all others, so that any reader finds what the model's code asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.layout import Array, Layout, TensorRole, TensorSpec, check_unique, role_by_name
from fedgrpc.codec.values import InParts, Part, part_filled
from fedgrpc.errors import LayoutError, StorageError, UsageError
from fedgrpc.storage.files import RecycledFiles, pwrite, storage_errors, sync, write_back

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# The key of a file's header that names no tensor.
METADATA = "__metadata__"
_MAX_DIMS = 16
_MAX_HEADER_BYTES = 100_000_000
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CRC32 = re.compile(r"[0-9a-f]{8}")
_UNKNOWN_SHA256, _UNKNOWN_CRC32 = "0" * 64, "-" * 8
_READ_BYTES = 1 << 20
# What is given in place of a model again and again, by how it begins.
_MARKS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
    b"<!doctype html": "it is a web page; download the file itself",
    b"<html": "it is a web page; download the file itself",
    b"<?xml": "it is an XML page; download the file itself",
    b"pk\x03\x04": "it is a zip archive, as torch.save writes; save it with safetensors.torch.save_file",
    b"\x80\x02": "it is a pickle, as torch.save writes; save it with safetensors.torch.save_file",
    b"\x1f\x8b": "it is a gzip file; unpack it first",
    b"gguf": "it is a GGUF file; fedgrpc reads safetensors",
}
_LONGEST_MARK = 64
_LENGTH = struct.Struct("<Q")
# How the header of a file begins that was written here and has a tensor.
_OWN_SUMS = re.compile(rb'\{"__metadata__":\{"format":"pt",((?:"sha256":"[0-9a-f]{64}",)?"crc32":"[0-9a-f-]{8}")')
_KNOWN_HEADERS = 8
_KNOWN_HEADER_BYTES = 64 << 10

# Spec of a tensor, and from where to where its bytes go behind the header.
Entry = tuple[TensorSpec, int, int]


@dataclass(frozen=True)
class ModelFile:
    """A model on disk; tensors are read when asked for."""

    path: Path
    layout: Layout
    starts: tuple[int, ...]
    header: bytes
    tensors_sha256: bytes | None
    tensors_crc32: int | None = None

    @classmethod
    def open(cls, path: Path) -> ModelFile:
        """Read the header of the safetensors file at `path`. Raises `UsageError` when it is none."""
        try:
            with path.open("rb") as file:
                start = file.read(_LONGEST_MARK)
                size = _header_size(start)
                file.seek(8)
                text = file.read(size)
                entries, end, metadata = _parsed(text)
                if os.fstat(file.fileno()).st_size != 8 + size + end:
                    raise ValueError("its size is not what its header says")
        except OSError as error:
            raise UsageError(f"cannot read the model {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError, LayoutError, struct.error) as error:
            raise UsageError(f"{path} is not a safetensors file that fedgrpc can use: {error}") from error
        layout = tuple(spec for spec, _, _ in entries)
        starts = tuple(8 + size + start for _, start, _ in entries)
        sums = _kept(metadata, "sha256", _SHA256), _kept(metadata, "crc32", _CRC32)
        sha256 = bytes.fromhex(sums[0]) if sums[0] else None
        crc = int(sums[1], 16) if sums[1] else None
        return cls(path, layout, starts, struct.pack("<Q", size) + text, sha256, crc)

    def tensor(self, index: int) -> np.ndarray:
        """Tensor number `index` of the layout, freshly read. Raises `StorageError`."""
        spec = self.layout[index]
        return self.part(index, 0, spec.size).reshape(spec.shape)

    def part(self, index: int, start: int, stop: int) -> np.ndarray:
        """These elements of tensor number `index`, or of those of its dtype behind it, flat and freshly read.

        Raises `StorageError`.
        """
        values = np.empty(stop - start, self.layout[index].numpy_dtype)
        with storage_errors(f"the model {self.path}", "read"), self.path.open("rb", buffering=0) as file:
            file.seek(self.starts[index] + start * values.itemsize)
            size_bytes = file.readinto(values.view(np.uint8).data)
        if size_bytes != values.nbytes:
            raise StorageError(f"the model {self.path} is cut short")
        return values

    def named(self, name: str) -> np.ndarray:
        """The tensor of that name, freshly read. Raises `StorageError`."""
        return self.tensor(next(index for index, spec in enumerate(self.layout) if spec.name == name))

    @property
    def tensors_start(self) -> int:
        """Where the first tensor begins."""
        return len(self.header)

    def sha256(self) -> bytes:
        """Digest of the whole file, as `ModelWriter.finish` returns it. Raises `StorageError`."""
        return hashlib.sha256(self.header + self.computed_sha256()).digest()

    @property
    def as_written(self) -> bool:
        """Whether its tensors are what its header says; False where it says nothing. Raises `StorageError`."""
        if self.tensors_crc32 is None:
            return self.tensors_sha256 == self.computed_sha256()
        crc = 0
        for data in self._pieces():
            crc = crc32(data, crc)
        return crc == self.tensors_crc32

    def computed_sha256(self) -> bytes:
        """Digest of the tensors as they are on the disk now. Raises `StorageError`."""
        digest = hashlib.sha256()
        for data in self._pieces():
            digest.update(data)
        return digest.digest()

    def _pieces(self) -> Iterator[bytes]:
        """The bytes of all tensors, in order, each tensor once."""
        left = sum(spec.nbytes for spec in self.layout)
        with storage_errors(f"the model {self.path}", "read"), self.path.open("rb", buffering=0) as file:
            file.seek(self.tensors_start)
            while left and (data := file.read(min(_READ_BYTES, left))):
                left -= len(data)
                yield data


class ModelTensors(InParts):
    """A model's tensors by name, read when they are asked for."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self._index = {spec.name: index for index, spec in enumerate(model.layout)}
        self._file: FileIO | None = None

    def __getitem__(self, name: str) -> Array:
        return self._model.tensor(self._index[name])

    def part_of(self, name: str) -> Part:
        """See `InParts.part_of`. It, and what it gives, raise `StorageError`."""
        index, name_of_file = self._index[name], f"the model {self._model.path}"
        file, first = self._opened(), self._model.starts[index]

        def fill(out: Array, start: int) -> None:
            with storage_errors(name_of_file, "read"):
                size_bytes = os.preadv(file.fileno(), [out.view(np.uint8).data], first + start * out.itemsize)
            if size_bytes != out.nbytes:
                raise StorageError(f"{name_of_file} is cut short")

        return part_filled(fill, self._model.layout[index].numpy_dtype)

    def _opened(self) -> FileIO:
        if self._file is None:
            with storage_errors(f"the model {self._model.path}", "read"):
                self._file = self._model.path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)
        return self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


class ModelWriter:
    """Writes a model file one tensor at a time; nothing is at `path` until `finish` has put all of it there.

    One that is not `durable` never travels either: it has no digest. Raises `StorageError` when
    the disk does not take it; `path` is then as it was.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        spares: RecycledFiles | None = None,
        *,
        durable: bool = True,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`about` is text for the metadata of the file."""
        self._path = path
        self._durable = durable
        self._part = path.with_suffix(".part")
        self._waiting = iter(layout)
        self._spec, self._left = TensorSpec("", "float32", (0,)), 0
        sha256 = {"sha256": _UNKNOWN_SHA256} if durable else {}
        self._header = _header(layout, {**sha256, "crc32": _UNKNOWN_CRC32, **about}, twice=durable)
        self._tied = _tied(layout) if durable else []
        self._start_bytes = len(self._header)
        self._digest, self._crc32 = hashlib.sha256(), 0
        self._size_bytes = 0
        with storage_errors(f"the model {self._path}", "write"):
            handle = spares.create(self._part) if spares else os.open(self._part, _NEW, 0o666)
            self._file = FileIO(handle, "r+")
            self._put(self._header)

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.close()
            self._part.unlink(missing_ok=True)

    def add(self, values: np.ndarray) -> None:
        """Write the next elements of a tensor, cast to its dtype; they may go on into the next of this dtype."""
        if not self._left:
            self._go_on()
        dtype, left = self._spec.numpy_dtype, values.size
        while left > self._left:
            left -= self._left
            self._go_on()
            if self._spec.numpy_dtype != dtype:
                raise ValueError(f"tensor {self._spec.name!r} is {self._spec.dtype}")
        self._left -= left
        data = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8).data
        if self._durable:
            self._digest.update(data)
        self._crc32 = crc32(data, self._crc32)
        with storage_errors(f"the model {self._path}", "write"):
            self._put(data)

    def _go_on(self) -> None:
        self._spec = next(self._waiting)
        self._left = self._spec.size

    def _put(self, data: bytes | memoryview) -> None:
        pwrite(self._file.fileno(), data, self._size_bytes)
        if self._durable:
            write_back(self._file.fileno(), self._size_bytes, len(data))
        self._size_bytes += len(data)

    def _repeat(self, start: int, size_bytes: int) -> None:
        """Write once more what was written from byte `start` on."""
        with storage_errors(f"the model {self._path}", "write"):
            for at in range(start, start + size_bytes, _READ_BYTES):
                size = min(_READ_BYTES, start + size_bytes - at)
                self._put(os.pread(self._file.fileno(), size, at))

    def finish(self) -> bytes:
        """Make the file durable, if it is to be, and give it its name; returns its digest (b"": it has none)."""
        spec = self._spec if self._left else next(self._waiting, None)
        if spec is not None:
            raise ValueError(f"tensor {spec.name!r} was not written")
        for _, start, size_bytes in self._tied:
            self._repeat(self._start_bytes + start, size_bytes)
        # Of the same length, and the first of what the header says.
        header = self._header.replace(_UNKNOWN_CRC32.encode(), b"%08x" % self._crc32, 1)
        if self._durable:
            header = header.replace(_UNKNOWN_SHA256.encode(), self._digest.hexdigest().encode(), 1)
        with storage_errors(f"the model {self._path}", "write"):
            pwrite(self._file.fileno(), header, 0)
            os.ftruncate(self._file.fileno(), self._size_bytes)
            if self._durable:
                os.fsync(self._file.fileno())
            self._part.replace(self._path)
            if self._durable:
                sync(self._path.parent)
        return hashlib.sha256(header + self._digest.digest()).digest() if self._durable else b""


def _header_size(start: bytes) -> int:
    """Bytes of a file's header, as its first eight say. Raises ValueError, and says what the file is instead."""
    if len(start) < _LENGTH.size:
        raise ValueError("it is cut short" if start else "it is empty")
    size = int(_LENGTH.unpack_from(start)[0])
    if size > _MAX_HEADER_BYTES:
        text = start.lstrip().lower()
        raise ValueError(
            next((what for mark, what in _MARKS.items() if text.startswith(mark)), "its header is too large")
        )
    return size


def write_model(
    path: Path, layout: Layout, tensors: Iterable[np.ndarray], about: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Write a whole model file; `tensors` come in the order of `layout`. Returns its digest."""
    with ModelWriter(path, layout, about=about) as writer:
        for values in tensors:
            writer.add(values)
        return writer.finish()


def _header(layout: Layout, kept: dict[str, str], twice: bool) -> bytes:
    """The head of a file of these tensors; `twice`: those that are tied once more for each of their names."""
    entries: dict[str, object] = {METADATA: {"format": "pt", **kept, **_told(layout)}}
    offset = 0
    again = [(name, replace(spec, name=name)) for spec in layout for name in spec.tied_names] if twice else []
    for name, spec in [*((spec.name, spec) for spec in layout), *again]:
        span = [offset, offset + spec.nbytes]
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tied(layout: Layout) -> list[tuple[str, int, int]]:
    """Name, place and bytes of what is written once more, in the order of `_header`."""
    found, offset = [], 0
    for spec in layout:
        found += [(name, offset, spec.nbytes) for name in spec.tied_names]
        offset += spec.nbytes
    return found


def _told(layout: Layout) -> dict[str, str]:
    """What the metadata says of the tensors, beside what the format says."""
    told: dict[str, dict[str, Any]] = {
        "roles": {spec.name: spec.role for spec in layout if spec.role is not role_by_name(spec.name)},
        "tied": {spec.name: list(spec.tied_names) for spec in layout if spec.tied_names},
    }
    return {key: json.dumps(about, separators=(",", ":")) for key, about in told.items() if about}


def _parsed(text: bytes) -> tuple[Sequence[Entry], int, object]:
    """The tensors that a header tells of, where their bytes end, and its metadata. Raises as `_entries`."""
    own = _OWN_SUMS.match(text)
    if own is None or len(text) > _KNOWN_HEADER_BYTES:
        return _parse(text)
    entries, end, _ = _known(text[: own.start(1)] + b'"":""' + text[own.end(1) :])
    return entries, end, json.loads(b"{" + own[1] + b"}")


@lru_cache(maxsize=_KNOWN_HEADERS)
def _known(text: bytes) -> tuple[Sequence[Entry], int, object]:
    """Parsed once for all versions of a model: their headers differ in the sums alone."""
    return _parse(text)


def _parse(text: bytes) -> tuple[Sequence[Entry], int, object]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.get(METADATA)
    entries = _entries(header)
    end = entries[-1][2] if entries else 0
    return _described(entries, metadata if isinstance(metadata, dict) else {}), end, metadata


def _described(entries: list[Entry], metadata: dict[str, Any]) -> list[Entry]:
    """The tensors with the roles and tied names that the metadata tells, each once. Raises as `_entries`."""
    roles, tied = _object(metadata, "roles"), _object(metadata, "tied")
    names = {spec.name for spec, _, _ in entries}
    for name, kept in metadata.items():
        # As `safetensors.torch.save_model` notes the names that it leaves out.
        if isinstance(kept, str) and kept in names and name not in names:
            tied.setdefault(kept, []).append(name)
    left_out = {name for tied_names in tied.values() for name in tied_names}
    found = [
        (
            replace(
                spec,
                role=TensorRole(roles[spec.name]) if spec.name in roles else role_by_name(spec.name),
                tied_names=tuple(map(str, tied.get(spec.name, ()))),
            ),
            start,
            stop,
        )
        for spec, start, stop in entries
        if spec.name not in left_out
    ]
    for spec, _, _ in found:
        spec.validate(_MAX_DIMS)
    if sum(spec.nbytes for spec, _, _ in found) != (found[-1][2] if found else 0):
        raise ValueError("tensors under a second name are not behind all others")
    check_unique(tuple(spec for spec, _, _ in found))
    return found


def _object(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    """What a key of the metadata says, a JSON object. Raises ValueError."""
    text = metadata.get(key)
    if text is None:
        return {}
    told = json.loads(text) if isinstance(text, str) else text
    if not isinstance(told, dict):
        raise ValueError(f"its {key} are no JSON object")
    return told


def _kept(metadata: object, name: str, form: re.Pattern[str]) -> str | None:
    """What the file says of its tensors; None in a file that was not written here."""
    text = metadata.get(name) if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not form.fullmatch(text) or text == _UNKNOWN_SHA256:
        return None
    return text


def _entries(header: dict[str, dict[str, Any]]) -> list[Entry]:
    """(spec, start, stop) in file order. Raises ValueError for holes, overlaps, unknown dtypes and wrong sizes."""
    found: list[Entry] = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}")
        start, stop = entry["data_offsets"]
        if any(type(number) is not int for number in (start, stop, *entry["shape"])):
            raise ValueError(f"the shape or place of tensor {name!r} is not in whole numbers")
        spec = TensorSpec(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        spec.validate(_MAX_DIMS)
        found.append((spec, start, stop))
    found.sort(key=lambda item: item[1])
    at = 0
    for spec, start, stop in found:
        if start != at or stop - start != spec.nbytes:
            raise ValueError(f"the bytes of tensor {spec.name!r} are not where they belong")
        at = stop
    return found

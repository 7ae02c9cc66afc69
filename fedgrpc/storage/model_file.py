"""Model files in the safetensors format, one tensor at a time.

The safetensors package writes only whole models from memory; an aggregator holds one tensor at a time, so that
its memory does not grow with the model. Files written here are read by that package, and the other way round.

The tensors of a file, end to end, are also the payload of the model in the raw recipe. So its header keeps the
digest of that payload, and their SHA-256: the identity of the version is that of the header and this. Beside them
is their CRC-32, which is checked whenever something is decided by the file. A file that never travels has this
alone.

A version has each tied tensor again under its other names, behind all others, so that any reader finds what the
model's code asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from fedgrpc.aggregation.admission import sum_of_squares
from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.digest import new_digest
from fedgrpc.codec.layout import Array, Layout, TensorSpec
from fedgrpc.codec.values import InParts, Part, part_filled
from fedgrpc.errors import LayoutError, StorageError, UsageError
from fedgrpc.storage.files import RecycledFiles, pwrite, read_pieces, storage_errors, sync, write_back
from fedgrpc.storage.model_header import (
    FIRST_BYTES,
    METADATA,
    TensorSums,
    build_header,
    header_size,
    packed,
    parse_header,
    tied_spans,
    with_sums,
)

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_READ_BYTES: Final = 1 << 20
# Elements in memory at a time.
_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class ModelFile:
    """A model on disk; tensors are read when asked for."""

    path: Path
    layout: Layout
    starts: tuple[int, ...]
    header: bytes
    sums: TensorSums

    @classmethod
    def open(cls, path: Path) -> ModelFile:
        """Read the header of the safetensors file at `path`. Raises `UsageError` when it is none."""
        try:
            with path.open("rb") as file:
                size = header_size(file.read(FIRST_BYTES))
                file.seek(8)
                text = file.read(size)
                header = parse_header(text)
                if os.fstat(file.fileno()).st_size != 8 + size + header.end:
                    raise ValueError("its size is not what its header says")
        except OSError as error:
            raise UsageError(f"cannot read the model {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError, LayoutError, struct.error) as error:
            raise UsageError(f"{path} is not a safetensors file that fedgrpc can use: {error}") from error
        layout = tuple(spec for spec, _, _ in header.entries)
        starts = tuple(8 + size + start for _, start, _ in header.entries)
        return cls(path, layout, starts, packed(text), header.sums)

    def tensor(self, index: int) -> np.ndarray:
        """Tensor number `index` of the layout, freshly read. Raises `StorageError`."""
        spec = self.layout[index]
        return self.part(index, 0, spec.size).reshape(spec.shape)

    def part(self, index: int, start: int, stop: int) -> np.ndarray:
        """Read these elements of tensor number `index`, or of those of its dtype behind it, flat and freshly read.

        Raises `StorageError`.
        """
        with storage_errors(f"the model {self.path}", "read"), self.path.open("rb", buffering=0) as file:
            return self._part_of(file, index, start, stop)

    def _part_of(self, file: FileIO, index: int, start: int, stop: int) -> np.ndarray:
        values = np.empty(stop - start, self.layout[index].numpy_dtype)
        at = self.starts[index] + start * values.itemsize
        if os.preadv(file.fileno(), [values.view(np.uint8).data], at) != values.nbytes:
            raise StorageError(f"the model {self.path} is cut short")
        return values

    def named(self, name: str) -> np.ndarray:
        """The tensor of that name, freshly read. Raises `StorageError`."""
        return self.tensor(next(index for index, spec in enumerate(self.layout) if spec.name == name))

    def about(self, key: str) -> str:
        """Return what the file's metadata has under `key`; "": nothing."""
        value = json.loads(self.header[8:]).get(METADATA, {}).get(key, "")
        return value if isinstance(value, str) else ""

    @property
    def tensors_start(self) -> int:
        """Offset of the first tensor."""
        return len(self.header)

    def sha256(self) -> bytes:
        """SHA-256 of the whole file, as `ModelWriter.finish` returns it. Raises `StorageError`."""
        return hashlib.sha256(self.header + self.computed_sha256()).digest()

    @property
    def as_written(self) -> bool:
        """True if the tensors are what the header says; False where it says nothing. Raises `StorageError`."""
        # A file that others have written may have no CRC-32, or no sum at all.
        if self.sums.crc32 is None:
            return self.sums.sha256 == self.computed_sha256()
        crc = 0
        for data in self._pieces():
            crc = crc32(data, crc)
        return crc == self.sums.crc32

    def computed_sha256(self) -> bytes:
        """SHA-256 of the tensors as they are on the disk now. Raises `StorageError`."""
        # Piece by piece: a model may be larger than the memory that is free.
        digest = hashlib.sha256()
        for data in self._pieces():
            digest.update(data)
        return digest.digest()

    def norm(self) -> float:
        """Return the L2 norm of the float tensors, read in pieces. Raises `StorageError`."""
        square = 0.0
        with storage_errors(f"the model {self.path}", "read"), self.path.open("rb", buffering=0) as file:
            for index, spec in enumerate(self.layout):
                for start in range(0, spec.size if spec.is_float else 0, _PIECE):
                    square += sum_of_squares(self._part_of(file, index, start, min(start + _PIECE, spec.size)))
        return math.sqrt(square)

    def content_digest(self) -> bytes:
        """Return the SHA-256 of names, types, shapes and values, in whatever order the file has them.

        Raises `StorageError`.
        """
        digest = hashlib.sha256()
        for index in sorted(range(len(self.layout)), key=lambda each: self.layout[each].name):
            spec = self.layout[index]
            digest.update(f"{spec.name}\0{spec.dtype}\0{spec.shape}\0".encode())
            inner = hashlib.sha256()
            for start in range(0, spec.size, _PIECE):
                inner.update(self.part(index, start, min(start + _PIECE, spec.size)).view(np.uint8).data)
            digest.update(inner.digest())
        return digest.digest()

    def _pieces(self) -> Iterator[memoryview]:
        """The bytes of all tensors, in order, each tensor once, each piece good until the next."""
        size_bytes = sum(spec.nbytes for spec in self.layout)
        with storage_errors(f"the model {self.path}", "read"), self.path.open("rb", buffering=0) as file:
            yield from read_pieces(file.fileno(), self.tensors_start, size_bytes)


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
            # Parts may be read long after the file was pruned: their holder keeps it open.
            weakref.finalize(self, self._file.close)
        return self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


class ModelWriter:
    """Write a model file one tensor at a time; nothing is at `path` until `finish` has put all of it there.

    A file that is not `durable` never travels either, and has a CRC-32 alone. Raises `StorageError` when the disk
    does not take it; `path` is then as it was.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        recycled: RecycledFiles | None = None,
        *,
        durable: bool = True,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Begin the file; `about` is text for its metadata."""
        self._path = path
        self._durable = durable
        # Beside its final place: a rename across file systems would be a copy.
        self._part = path.with_suffix(".part")
        self._coming = iter(layout)
        self._spec, self._left = TensorSpec("", "float32", (0,)), 0
        self._header = build_header(layout, dict(about), with_digests=durable, repeat_tied=durable)
        self._tied = tied_spans(layout) if durable else []
        self._sha256, self._digest, self._crc32 = hashlib.sha256(), new_digest(), 0
        self._size_bytes = 0
        with storage_errors(f"the model {self._path}", "write"):
            handle = recycled.create(self._part) if recycled else os.open(self._part, _NEW, 0o666)
            self._file = FileIO(handle, "r+")
            self._put(self._header)

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # After `finish` there is nothing under this name; after an error there must be nothing.
        with suppress(OSError):
            self._file.close()
            self._part.unlink(missing_ok=True)

    def add(self, values: np.ndarray) -> None:
        """Write the next elements of a tensor, cast to its dtype; they may reach into the next of this dtype."""
        if not self._left:
            self._begin_next()
        dtype, left = self._spec.numpy_dtype, values.size
        while left > self._left:
            left -= self._left
            self._begin_next()
            if self._spec.numpy_dtype != dtype:
                raise ValueError(f"tensor {self._spec.name!r} is {self._spec.dtype}")
        self._left -= left
        data = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8).data
        if self._durable:
            # While the bytes are in the cache; a second pass over the file would cost as much as the write.
            self._sha256.update(data)
            self._digest.update(data)
        self._crc32 = crc32(data, self._crc32)
        with storage_errors(f"the model {self._path}", "write"):
            self._put(data)

    def _begin_next(self) -> None:
        self._spec = next(self._coming)
        self._left = self._spec.size

    def _put(self, data: bytes | memoryview) -> None:
        pwrite(self._file.fileno(), data, self._size_bytes)
        if self._durable:
            write_back(self._file.fileno(), self._size_bytes, len(data))
        self._size_bytes += len(data)

    def _repeat(self, start: int, size_bytes: int) -> None:
        """Copy `size_bytes` of the file, from byte `start`, to its end."""
        with storage_errors(f"the model {self._path}", "write"):
            for at in range(start, start + size_bytes, _READ_BYTES):
                size = min(_READ_BYTES, start + size_bytes - at)
                self._put(os.pread(self._file.fileno(), size, at))

    def finish(self) -> bytes:
        """Make the file durable, if it is to be, and give it its name. Returns its SHA-256; b"": it has none."""
        spec = self._spec if self._left else next(self._coming, None)
        if spec is not None:
            raise ValueError(f"tensor {spec.name!r} was not written")
        # Copied within the file, since the tensor is no longer in memory.
        for start, size_bytes in self._tied:
            self._repeat(len(self._header) + start, size_bytes)
        sums = TensorSums(self._crc32)
        if self._durable:
            sums = TensorSums(self._crc32, self._sha256.digest(), self._digest.digest())
        header = with_sums(self._header, sums)
        with storage_errors(f"the model {self._path}", "write"):
            pwrite(self._file.fileno(), header, 0)
            # Cut off what the recycled file had behind: its size is part of the format.
            os.ftruncate(self._file.fileno(), self._size_bytes)
            # Content before name, name before any answer: after a power cut the name means a whole file.
            if self._durable:
                os.fsync(self._file.fileno())
            self._part.replace(self._path)
            if self._durable:
                sync(self._path.parent)
        return b"" if sums.sha256 is None else hashlib.sha256(header + sums.sha256).digest()


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a model file by name, a tied tensor under each of its names.

    Raises `UsageError` for a file that is none, and `StorageError` for one that is cut short.
    """
    model = ModelFile.open(path)
    weights: dict[str, np.ndarray] = {}
    for index, spec in enumerate(model.layout):
        weights |= dict.fromkeys((spec.name, *spec.tied_names), model.tensor(index))
    return weights


def write_model(
    path: Path, layout: Layout, tensors: Iterable[np.ndarray], about: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Write a whole model file from `tensors` in the order of `layout`. Returns its SHA-256."""
    with ModelWriter(path, layout, about=about) as writer:
        for values in tensors:
            writer.add(values)
        return writer.finish()

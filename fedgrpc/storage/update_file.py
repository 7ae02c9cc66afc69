"""An accepted update on the disk, and reading its tensors a piece at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import PayloadReader, Submit, in_pieces, neighbours
from fedgrpc.codec.values import Fill
from fedgrpc.errors import CorruptError, StorageError
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.resumable import is_whole
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

_READ_BYTES = 1 << 20
_PIECE = 1 << 15


@dataclass(frozen=True)
class StoredUpdate:
    """An update on the disk, with a manifest that was validated."""

    path: Path
    header: UpdateHeader
    manifest: Manifest
    payload_start: int

    def check(self) -> None:
        """Raise `CorruptError` unless the file is what was accepted, and `StorageError` when it cannot be read."""
        with storage_errors(f"the update {self.path}", "read"):
            whole = is_whole(self.path, self.manifest.size_bytes, self.payload_start)
        if not whole:
            raise CorruptError(f"the update {self.path.name} has changed on the disk: its CRC does not match")

    def open(self, submit: Submit | None = None) -> UpdateFile:
        """Open the update for reading; `submit` as in `PayloadReader`. Raises `StorageError`, as reading does."""
        return UpdateFile(_PayloadBytes(self), self.manifest, submit)


class PayloadBytes(Protocol):
    """Reads of an update's payload."""

    def fill(self, place: int, out: np.ndarray, first: int) -> None:
        """Fill `out` with elements of the tensor at `place` of the payload, from element `first` on."""

    def read(self, offset: int, size: int) -> memoryview:
        """Return these bytes of the payload."""

    def close(self) -> None:
        """Read no more."""


class _PayloadBytes:
    """Reads of the payload within the open file of a `StoredUpdate`."""

    def __init__(self, update: StoredUpdate) -> None:
        self._name = f"the update {update.path}"
        with storage_errors(self._name, "read"):
            self._file = update.path.open("rb", buffering=0)
        self._start = update.payload_start
        self._size_bytes = update.manifest.size_bytes
        # What was read ahead, and from where on.
        self._ahead_at, self._ahead = 0, memoryview(b"")

    def fill(self, place: int, out: np.ndarray, first: int) -> None:
        """See `PayloadBytes.fill`."""
        data = out.view(np.uint8).data
        with storage_errors(self._name, "read"):
            size_bytes = os.preadv(self._file.fileno(), [data], self._start + place + first * out.itemsize)
        if size_bytes != len(data):
            raise StorageError(f"{self._name} is cut short")

    def read(self, offset: int, size: int) -> memoryview:
        """See `PayloadBytes.read`."""
        if size >= _READ_BYTES:
            return self._pread(offset, size)
        within = offset - self._ahead_at
        if within < 0 or within + size > len(self._ahead):
            # Most tensors are small, and are asked for one after the other: read many of them at once.
            self._ahead_at, within = offset, 0
            self._ahead = self._pread(offset, min(_READ_BYTES, self._size_bytes - offset))
        return self._ahead[within : within + size]

    def _pread(self, offset: int, size: int) -> memoryview:
        # numpy takes large pieces of memory as huge pages, which cost a fraction of bytes' small ones.
        data = np.empty(size, np.uint8).data
        with storage_errors(self._name, "read"):
            return data[: os.preadv(self._file.fileno(), [data], self._start + offset)]

    def close(self) -> None:
        """See `PayloadBytes.close`."""
        self._file.close()


class UpdateFile:
    """A `StoredUpdate` open for reading; a context manager.

    Nothing here refers back to its owner: what was read of thousands of updates would wait for the collector.
    """

    def __init__(self, payload: PayloadBytes, manifest: Manifest, submit: Submit | None = None) -> None:
        self._payload = payload
        self.reader = PayloadReader(manifest, payload.read, valid=True, submit=submit)
        self._buffers: dict[str, np.ndarray] = {}

    def __enter__(self) -> PayloadReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._payload.close()

    def pieces(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Read every tensor in order, most of them flat in pieces that fit the cache, each good until the next."""
        for entry in self.reader.manifest.entries:
            yield from self._pieces_of(entry, entry.spec.size)

    def long_pieces(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Yield as `pieces` does, but a piece reaches into the next tensors where they can be read in one."""
        for entry, size in self._runs():
            yield from self._pieces_of(entry, size)

    def bounds(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Yield as `long_pieces` does, but of quantized tensors only bounds that none of their values exceeds."""
        for entry, size in self._runs():
            bounds = self.reader.bounds(entry.spec.name)
            # An infinite bound says nothing of the values: then they are looked at themselves.
            if bounds is not None and np.isfinite(bounds).all():
                yield entry.spec, bounds
            else:
                yield from self._pieces_of(entry, size)

    def _runs(self) -> Iterator[tuple[TensorEntry, int]]:
        """Group tensors that can be read in one: the first of each group, and the elements of all of it."""
        entries, together = self.reader.manifest.entries, neighbours(self.reader.manifest)
        at = 0
        while at < len(entries):
            first, size = entries[at], entries[at].spec.size
            while at + 1 < len(entries) and (entries[at].spec.name, entries[at + 1].spec.name) in together:
                at += 1
                size += entries[at].spec.size
            yield first, size
            at += 1

    def _pieces_of(self, entry: TensorEntry, size: int) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        spec = entry.spec
        if not (spec.is_float and in_pieces(entry)):
            yield spec, self.reader.tensor(spec.name)
            return
        # One buffer for each dtype: pieces are good until the next, and stay in the cache.
        if spec.dtype not in self._buffers:
            self._buffers[spec.dtype] = np.empty(_PIECE, spec.numpy_dtype)
        fill = self.fill_from(spec.name)
        for start in range(0, size, _PIECE):
            piece = self._buffers[spec.dtype][: min(_PIECE, size - start)]
            fill(piece, start)
            yield spec, piece

    def fill_from(self, name: str) -> Fill:
        """Return a function that fills an array with elements of a tensor that is `in_pieces`."""
        place = self.reader.raw_place(name)
        return self.reader.fill_from(name) if place is None else partial(self._payload.fill, place)

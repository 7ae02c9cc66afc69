"""Error-feedback residuals on disk: the raw arrays end to end, a JSON text of what they are, and its length.

Written and read one tensor at a time, so that no residual is ever whole in memory. The run's name is kept with
them, since an error owed to one run is none of another's.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from io import BufferedWriter
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import structlog

from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import Array, Layout, TensorRole, TensorSpec
from fedgrpc.codec.values import InParts, Part, flat, part_filled
from fedgrpc.errors import LayoutError, StorageError
from fedgrpc.storage.files import RecycledFiles, WrittenBack, storage_errors

_LENGTH: Final = struct.Struct("<Q")
_MAX_ABOUT_BYTES: Final = 64 << 20
_PIECE_BYTES: Final = 1 << 20

log = structlog.get_logger()


class ResidualWriter:
    """Write the residual of `run` to `path`, tensor by tensor; the caller makes it durable."""

    def __init__(self, path: Path, run: str, recycled: RecycledFiles | None = None) -> None:
        self._path = path
        self._run = run
        self._recycled = recycled
        self._file: BinaryIO | None = None
        self._names: list[str] = []
        self._crc32 = 0

    @property
    def begun(self) -> bool:
        """True if a tensor was added."""
        return bool(self._names)

    def add(self, name: str, array: Array) -> None:
        """Write the next tensor, or the next part of the last one. Raises OSError."""
        data = flat(array).view(np.uint8).data
        self._crc32 = crc32(data, self._crc32)
        self._opened().write(data)
        if not self._names or self._names[-1] != name:
            self._names.append(name)

    def finish(self, layout: Layout) -> None:
        """Write what the arrays are, behind them: the residual of an update of that layout. Raises OSError."""
        about = {
            "run": self._run,
            "layout": [[spec.name, spec.dtype, list(spec.shape), spec.role] for spec in layout],
            "tensors": self._names,
            "crc32": self._crc32,
        }
        text = json.dumps(about).encode()
        file = self._opened()
        file.write(text + _LENGTH.pack(len(text)))
        # The length is looked for at the end: nothing of a recycled file may stand behind it.
        file.truncate()
        self.close()

    def close(self) -> None:
        """Close the file; one that is not finished means nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            handle = self._recycled.create(self._path) if self._recycled else os.open(self._path, flags, 0o666)
            self._file = BufferedWriter(WrittenBack(handle))
        return self._file


def write_residual(path: Path, residual: Residual, run: str) -> None:
    """Write a whole residual. Raises OSError."""
    writer = ResidualWriter(path, run)
    try:
        for name, array in residual.tensors.items():
            writer.add(name, array)
        writer.finish(residual.layout)
    finally:
        writer.close()


def read_residual(path: Path, run: str) -> Residual:
    """Open the residual of `run` at `path`; empty where there is none, or none that can be used.

    Its CRC is checked here; tensors are read when asked for. Raises OSError when it cannot be read now.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return Residual()
    try:
        about, content_bytes = _read_about(file)
        # An error that one run is owed is none of another's.
        if about["run"] != run:
            return Residual()
        layout: Layout = tuple(
            TensorSpec(name, dtype, tuple(shape), TensorRole(role)) for name, dtype, shape, role in about["layout"]
        )
        specs = {spec.name: spec for spec in layout}
        tensors = _Stored(file, tuple(specs[name] for name in about["tensors"]))
        if tensors.size_bytes != content_bytes:
            raise ValueError(f"{content_bytes} bytes of arrays are not those that it tells of")
        if _crc32_of(file, content_bytes) != about["crc32"]:
            raise ValueError("its CRC does not match")
    # Training continues without what is owed: less exact once, and never wrong.
    except (ValueError, KeyError, TypeError, RecursionError, LayoutError) as error:
        log.warning("residual dropped", reason=f"{path} is corrupt: {error}")
        return Residual()
    return Residual(layout, tensors)


def _read_about(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Read what the file says of its arrays, and how many bytes they have. Raises ValueError."""
    size_bytes = os.fstat(file.fileno()).st_size
    start = size_bytes - _LENGTH.size
    if start < 0:
        raise ValueError("it is cut short")
    (length,) = _LENGTH.unpack(os.pread(file.fileno(), _LENGTH.size, start))
    # Checked before anything of that size is read: the number may be any.
    if length > min(start, _MAX_ABOUT_BYTES):
        raise ValueError("it is cut short")
    about = json.loads(os.pread(file.fileno(), length, start - length))
    if not isinstance(about, dict):
        raise ValueError("it tells nothing of its arrays")
    return about, start - length


def _crc32_of(file: BinaryIO, size_bytes: int) -> int:
    crc, piece = 0, memoryview(bytearray(_PIECE_BYTES))
    for offset in range(0, size_bytes, _PIECE_BYTES):
        count = os.preadv(file.fileno(), [piece[: min(_PIECE_BYTES, size_bytes - offset)]], offset)
        crc = crc32(piece[:count], crc)
    return crc


class _Stored(InParts):
    """Arrays in an open file, read each time that they are asked for."""

    def __init__(self, file: BinaryIO, specs: tuple[TensorSpec, ...]) -> None:
        starts = list(accumulate((spec.nbytes for spec in specs), initial=0))
        self.size_bytes = starts[-1]
        self._file = file
        self._places = {spec.name: (spec, start) for spec, start in zip(specs, starts, strict=False)}

    def __getitem__(self, name: str) -> Array:
        spec, start = self._places[name]
        array = np.empty(spec.size, spec.numpy_dtype)
        self._read(array, start)
        return array.reshape(spec.shape)

    def part_of(self, name: str) -> Part:
        """See `InParts.part_of`."""
        spec, first = self._places[name]

        def fill(out: Array, start: int) -> None:
            self._read(out, first + start * out.itemsize)

        return part_filled(fill, spec.numpy_dtype)

    def _read(self, out: Array, offset: int) -> None:
        data, done = out.view(np.uint8).data, 0
        while done < len(data):
            with storage_errors("the residual", "read"):
                count = os.preadv(self._file.fileno(), [data[done:]], offset + done)
            if not count:
                raise StorageError("the residual has become shorter")
            done += count

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

"""Error-feedback residuals on disk: one file, a JSON line of what follows, then the raw arrays end to end.

The run's name is kept with them, since an error owed to one run is none of another's.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import Layout, TensorSpec
from fedgrpc.codec.values import flat
from fedgrpc.errors import LayoutError
from fedgrpc.spares import SpareFiles

_MAX_HEADER_BYTES: Final = 64 << 20

log = structlog.get_logger()


def write_residual(path: Path, residual: Residual, run: str, spares: SpareFiles | None = None) -> None:
    """Write `residual` of `run` to `path`; the caller makes it durable, if it is to be."""
    crc32 = 0
    arrays = [flat(array).view(np.uint8).data for array in residual.tensors.values()]
    for data in arrays:
        crc32 = zlib.crc32(data, crc32)
    header = {
        "run": run,
        "layout": [[spec.name, spec.dtype, list(spec.shape)] for spec in residual.layout],
        "tensors": list(residual.tensors),
        "crc32": crc32,
    }
    with open(spares.create(path) if spares else path, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for data in arrays:
            file.write(data)
        file.truncate()


def read_residual(path: Path, run: str) -> Residual:
    """The residual of `run` at `path`; empty where there is none, or none that can be used."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(_MAX_HEADER_BYTES))
            if header["run"] != run:
                return Residual()
            return _read_tensors(file, header)
    except FileNotFoundError:
        return Residual()
    except (ValueError, KeyError, TypeError, LayoutError) as error:
        log.warning("residual dropped", reason=f"{path} is corrupt: {error}")
        return Residual()


def _read_tensors(file: Any, header: dict[str, Any]) -> Residual:
    layout: Layout = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in header["layout"])
    specs = {spec.name: spec for spec in layout}
    wanted = [specs[name] for name in header["tensors"]]
    left = os.fstat(file.fileno()).st_size - file.tell()
    if sum(spec.nbytes for spec in wanted) != left:
        raise ValueError(f"{left} bytes of arrays do not fit its header")
    tensors, crc32 = {}, 0
    for spec in wanted:
        array = np.empty(spec.shape, spec.numpy_dtype)
        data = array.reshape(-1).view(np.uint8).data
        if file.readinto(data) != spec.nbytes:
            raise ValueError("it is cut short")
        crc32 = zlib.crc32(data, crc32)
        tensors[spec.name] = array
    if crc32 != header["crc32"]:
        raise ValueError("its CRC does not match")
    return Residual(layout, tensors)

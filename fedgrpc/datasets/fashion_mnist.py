"""Fashion-MNIST from its IDX files, the format of MNIST, plain or gzipped.

http://yann.lecun.com/exdb/mnist: two zero bytes, the element type, the number of dimensions, each dimension
as a big-endian uint32, then the elements.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.errors import UsageError

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""

_UINT8 = 0x08
_MOST_BYTES = 4 << 30
_PIECE_BYTES = 1 << 20


def read_idx(path: Path) -> np.ndarray:
    """Read the array of an IDX file of unsigned bytes, unpacked if its name ends in .gz.

    Raises:
        UsageError: the file cannot be read, is not IDX, or has another length than its header says.
    """
    try:
        content = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8:
        raise UsageError(f"{path} is not an IDX file of unsigned bytes")
    header_bytes = 4 + 4 * content[3]
    if len(content) < header_bytes:
        raise UsageError(f"{path} is cut short")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", content[3], 4))
    if len(content) - header_bytes != math.prod(shape):
        raise UsageError(f"{path} declares shape {shape} but holds {len(content) - header_bytes} elements")
    try:
        return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)
    except ValueError as error:
        # With an extent of 0 the product is 0 whatever the others are, and numpy refuses those that overflow.
        raise UsageError(f"{path} declares the impossible shape {shape}") from error


def _unpacked(path: Path) -> bytes:
    """Unpack a gzip file in pieces and with a limit, since a few bytes may inflate to any size."""
    content = bytearray()
    with gzip.open(path) as file:
        while piece := file.read(_PIECE_BYTES):
            content += piece
            if len(content) > _MOST_BYTES:
                raise UsageError(f"{path} unpacks to more than {_MOST_BYTES >> 30} GiB; no IDX file is that large")
    return bytes(content)


def load_fashion_mnist(folder: Path | None = None) -> LabelledData:
    """Load inputs [N, 28, 28] uint8 from 0 to 255: 60000 to train on, 10000 held out.

    Xiao, Rasul and Vollgraf (arXiv 1708.07747).

    Raises:
        UsageError: the folder or one of its four files is missing or malformed.
    """
    folder = folder or FASHION_MNIST_FOLDER
    if not folder.is_dir():
        raise UsageError(
            f"no Fashion-MNIST in {folder}: give its folder with --data, or apt install dataset-fashion-mnist"
        )
    return LabelledData(_read_pair(folder, "train"), _read_pair(folder, "t10k"))


def _read_pair(folder: Path, name: str) -> Examples:
    images = read_idx(_find(folder, f"{name}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{name}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UsageError(f"{folder}: {name} has images {images.shape} and labels {labels.shape}")
    return Examples(images, labels.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UsageError(f"{folder} has no {name} or {name}.gz")

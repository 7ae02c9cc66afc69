"""CIFAR-10 from the archives that its authors publish, the Python or the binary one.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009). https://www.cs.toronto.edu/~kriz/cifar.html

The rule: an archive is data, never code. The pickles of the Python archive are read by an unpickler that can build
only arrays, strings, lists and dictionaries.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.errors import UsageError

PYTHON_ARCHIVE = "cifar-10-python.tar.gz"
BINARY_ARCHIVE = "cifar-10-binary.tar.gz"
_SITE = "https://www.cs.toronto.edu/~kriz/"
_PUBLISHED_MD5 = {
    PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
}
_PIXELS = 3 * 32 * 32
_BATCH_LIMIT_BYTES = 64 << 20
_TRAIN_PREFIX, _TEST_PREFIX = "data_batch_", "test_batch"


def load_cifar10(path: Path | None) -> LabelledData:
    """Load inputs [N, 3, 32, 32] uint8 from 0 to 255: 50000 to train on, 10000 held out.

    `path` is either archive, or a folder that holds one.

    Raises:
        UsageError: there is no archive, or its content is not CIFAR-10's.
    """
    archive = _find(path)
    train: list[tuple[str, Examples]] = []
    test: list[Examples] = []
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if not member.isfile() or not name.startswith((_TRAIN_PREFIX, _TEST_PREFIX)):
                    continue
                batch = _read_batch(tar, member, f"{archive}: {name}")
                if name.startswith(_TRAIN_PREFIX):
                    train.append((name, batch))
                else:
                    test.append(batch)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {archive}: {error}") from error
    if not train or len(test) != 1:
        raise UsageError(f"{archive} holds {len(train)} training batches and {len(test)} test batches")
    return LabelledData(_join([batch for _, batch in sorted(train, key=lambda pair: pair[0])]), test[0])


def download_cifar10(
    folder: Path,
    archive: str = BINARY_ARCHIVE,
    report: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    site: str = _SITE,
    md5: str | None = None,
) -> Path:
    """Download an archive into `folder` unless it is there. The file appears once its digest is as published.

    Raises:
        UsageError: the archive cannot be downloaded, or its digest differs.
    """
    expected = md5 or _PUBLISHED_MD5[archive]
    target = folder / archive
    if target.is_file() and _md5(target) == expected:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{archive}.part"
    try:
        with urllib.request.urlopen(site + archive, timeout=60) as answer, partial.open("wb") as file:
            total_bytes = int(answer.headers.get("Content-Length") or 0)
            while piece := answer.read(1 << 20):
                file.write(piece)
                report(file.tell(), total_bytes)
    except OSError as error:
        raise UsageError(f"cannot download {site}{archive}: {error}") from error
    if (found := _md5(partial)) != expected:
        partial.unlink()
        raise UsageError(f"{site}{archive} has MD5 {found}, not {expected} as published")
    return partial.replace(target)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _find(path: Path | None) -> Path:
    if path is None:
        raise UsageError(f"CIFAR-10 needs --data, the folder of {BINARY_ARCHIVE} or {PYTHON_ARCHIVE}")
    candidates = [path / BINARY_ARCHIVE, path / PYTHON_ARCHIVE] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    command = f"python -m fedgrpc.datasets.cifar10 {path}"
    raise UsageError(f"no {BINARY_ARCHIVE} or {PYTHON_ARCHIVE} in {path}: fetch one with {command}")


def _read_batch(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Examples:
    if member.size > _BATCH_LIMIT_BYTES:
        raise UsageError(f"{name} is {member.size} bytes, too large for a CIFAR-10 batch")
    stream = tar.extractfile(member)
    assert stream is not None  # only a member that is no file has no content
    content = stream.read()
    return _parse_binary(content, name) if name.endswith(".bin") else _parse_pickle(content, name)


def _parse_binary(content: bytes, name: str) -> Examples:
    """Parse records of one byte for the label and 3072 for the pixels, channel by channel."""
    if not content or len(content) % (1 + _PIXELS):
        raise UsageError(f"{name}: {len(content)} bytes are not whole records of {1 + _PIXELS} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return _examples(records[:, 1:], records[:, 0], name)


def _parse_pickle(content: bytes, name: str) -> Examples:
    try:
        _check_memo(content)
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
    except Exception as error:
        # Damaged pickles raise any exception of numpy, codecs and memory.
        raise UsageError(
            f"{name} is not a CIFAR-10 batch: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise UsageError(f"{name} is not a CIFAR-10 batch: it holds no uint8 pixels and integer labels")
    return _examples(pixels, labels, name)


def _examples(pixels: np.ndarray, labels: np.ndarray, name: str) -> Examples:
    if (
        pixels.shape != (len(labels), _PIXELS)
        or labels.ndim != 1
        or labels.size == 0
        or not 0 <= labels.min() <= labels.max() <= 9
    ):
        raise UsageError(f"{name}: pixels {pixels.shape} and labels {labels.shape} are not CIFAR-10's")
    return Examples(pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64))


def _join(batches: list[Examples]) -> Examples:
    inputs = np.concatenate([batch.inputs for batch in batches])
    return Examples(inputs, np.concatenate([batch.labels for batch in batches]))


def _check_memo(content: bytes) -> None:
    """Refuse places in the memo beyond the pickle's own size: the unpickler makes room for all before them."""
    for opcode, place, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(place or 0) > len(content):
            raise pickle.UnpicklingError(f"it would keep a value at place {place}")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and plain values that refuses every other name a pickle may call."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":
            return _encode_latin1
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it would decode {encoding}")
    return text.encode("latin-1")


def _main() -> None:
    import sys

    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m fedgrpc.datasets.cifar10 FOLDER")

    def show(done_bytes: int, total_bytes: int) -> None:
        print(f"\r{done_bytes >> 20} of {total_bytes >> 20} MiB", end="", file=sys.stderr, flush=True)

    try:
        print(download_cifar10(Path(sys.argv[1]), report=show))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    _main()

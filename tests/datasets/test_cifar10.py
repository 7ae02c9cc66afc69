"""CIFAR-10's archives, on small ones of the same format, and a downloader that believes only the digest."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedgrpc.datasets.cifar10 import BINARY_ARCHIVE, PYTHON_ARCHIVE, download_cifar10, load_cifar10
from fedgrpc.errors import UsageError

RNG = np.random.default_rng(0)
BATCHES = {
    name: (RNG.integers(0, 256, (4, 3072), dtype=np.uint8), RNG.integers(0, 10, 4).tolist())
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
}


def as_binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()


def as_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """As Python 2 wrote the published archive: byte strings, numpy by its old name, protocol 2."""
    batch = {b"data": pixels, b"labels": labels, b"batch_label": b"one of five", b"filenames": [b"a.png"] * 4}
    return pickle.dumps(batch, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def binary_archive(folder: Path) -> Path:
    members = {f"cifar-10-batches-bin/{name}.bin": as_binary(*batch) for name, batch in BATCHES.items()}
    return write_archive(
        folder / BINARY_ARCHIVE, {**members, "cifar-10-batches-bin/batches.meta.txt": b"airplane"}
    )


def python_archive(folder: Path) -> Path:
    members = {f"cifar-10-batches-py/{name}": as_pickle(*batch) for name, batch in BATCHES.items()}
    return write_archive(folder / PYTHON_ARCHIVE, {**members, "cifar-10-batches-py/batches.meta": b"\x80"})


@pytest.mark.parametrize("write", [binary_archive, python_archive])
def test_both_archives_hold_the_same_images_in_order(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    archive = write(tmp_path)
    for data in (load_cifar10(archive), load_cifar10(tmp_path)):
        expected = np.concatenate([BATCHES[f"data_batch_{number}"][0] for number in range(1, 6)])
        assert np.array_equal(data.train.inputs, expected.reshape(20, 3, 32, 32))
        assert data.held_out.labels.tolist() == BATCHES["test_batch"][1]
        assert data.train.labels.dtype == np.int64


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def test_a_pickle_that_asks_for_room_for_a_hundred_million_values_gets_none(tmp_path: Path) -> None:
    # LONG_BINPUT: the unpickler makes room for all places before this one.
    asking = b"\x80\x02" + b"K\x01" + b"r" + (100_000_000).to_bytes(4, "little") + b"."
    archive = write_archive(tmp_path / PYTHON_ARCHIVE, {"x/data_batch_1": asking})
    with pytest.raises(UsageError, match="place 100000000"):
        load_cifar10(archive)


def test_a_pickle_that_calls_anything_is_refused_and_calls_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = write_archive(tmp_path / PYTHON_ARCHIVE, {"x/data_batch_1": pickle.dumps(Harmful())})
    with pytest.raises(UsageError, match=r"would call (posix|nt)\.system"):
        load_cifar10(archive)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", pickle.dumps([1]), pickle.dumps({b"data": 1}), pickle.dumps({b"data": "x", b"labels": [1]}),
     as_pickle(np.zeros((4, 3072), np.uint8), [1, 2, 3]), as_pickle(np.zeros((4, 3071), np.uint8), [1] * 4),
     as_pickle(np.zeros((4, 3072), np.uint8), [1, 2, 3, 10]), as_pickle(np.zeros((4, 3072)), [1] * 4)],
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    archive = write_archive(tmp_path / PYTHON_ARCHIVE, {"x/data_batch_1": content})
    with pytest.raises(UsageError, match="data_batch_1"):
        load_cifar10(archive)


@pytest.mark.parametrize("content", [b"", b"x" * 3072, as_binary(np.zeros((1, 3072), np.uint8), [11])])
def test_a_binary_batch_of_the_wrong_size_or_label_is_refused(tmp_path: Path, content: bytes) -> None:
    archive = write_archive(tmp_path / BINARY_ARCHIVE, {"x/data_batch_1.bin": content})
    with pytest.raises(UsageError, match=r"data_batch_1\.bin"):
        load_cifar10(archive)


def test_an_archive_cut_short_or_without_test_batch_is_refused(tmp_path: Path) -> None:
    archive = binary_archive(tmp_path)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot read"):
        load_cifar10(archive)
    write_archive(archive, {"x/data_batch_1.bin": as_binary(*BATCHES["test_batch"])})
    with pytest.raises(UsageError, match="1 training batches and 0 test batches"):
        load_cifar10(archive)


def test_a_missing_archive_is_named_with_the_way_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"python -m fedgrpc\.datasets\.cifar10"):
        load_cifar10(tmp_path)
    with pytest.raises(UsageError, match="needs --data"):
        load_cifar10(None)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on loopback that serves one small archive."""
    folder = tmp_path / "site"
    folder.mkdir()
    archive = binary_archive(folder)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", archive
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_with_the_published_digest_is_kept_and_not_repeated(
    tmp_path: Path, site: tuple[str, Path]
) -> None:
    address, archive = site
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    progress: list[tuple[int, int]] = []
    kept = download_cifar10(
        tmp_path / "data", site=address, md5=md5, report=lambda done, total: progress.append((done, total))
    )
    assert load_cifar10(kept).train.inputs.shape == (20, 3, 32, 32)
    assert progress[-1] == (archive.stat().st_size, archive.stat().st_size)
    archive.unlink()
    assert download_cifar10(tmp_path / "data", site=address, md5=md5) == kept


def test_a_download_with_another_digest_is_thrown_away(tmp_path: Path, site: tuple[str, Path]) -> None:
    with pytest.raises(UsageError, match="as published"):
        download_cifar10(tmp_path / "data", site=site[0])
    assert list((tmp_path / "data").iterdir()) == []


def test_a_site_that_does_not_answer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot download"):
        download_cifar10(tmp_path, site="http://127.0.0.1:9/")

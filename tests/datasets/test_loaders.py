"""Loaders read what their formats promise, and say in one line what is wrong with what does not."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist, read_idx
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.datasets.shares import load_named, load_share, save_share, take_share, write_shares
from fedgrpc.errors import UsageError

ARRAYS = {
    "train-images-idx3-ubyte": np.arange(12 * 4 * 4, dtype=np.uint8).reshape(12, 4, 4),
    "train-labels-idx1-ubyte": (np.arange(12) % 10).astype(np.uint8),
    "t10k-images-idx3-ubyte": np.full((5, 4, 4), 7, np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
}


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, array in ARRAYS.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path


def test_fashion_mnist_is_read_from_gzipped_files(folder: Path) -> None:
    data = load_fashion_mnist(folder)
    assert np.array_equal(data.train.inputs, ARRAYS["train-images-idx3-ubyte"])
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(data.held_out) == 5


def test_fashion_mnist_is_read_from_plain_files(folder: Path) -> None:
    for packed in list(folder.glob("*.gz")):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert len(load_fashion_mnist(folder).train) == 12


def test_a_missing_folder_is_named_with_the_way_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*apt install dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path / "nowhere")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UsageError, match="has no t10k-labels-idx1-ubyte"):
        load_fashion_mnist(folder)


def test_one_label_too_few_is_refused(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(11, np.uint8))))
    with pytest.raises(UsageError, match=r"images \(12, 4, 4\) and labels \(11,\)"):
        load_fashion_mnist(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", b"PK\x03\x04 not this", bytes([0, 0, 13, 1, 0, 0, 0, 0]), bytes([0, 0, 8, 3, 0, 0]),
     idx_bytes(np.zeros(5, np.uint8))[:-1], idx_bytes(np.zeros(5, np.uint8)) + b"x"],
)  # fmt: skip
def test_a_malformed_idx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="file"):
        read_idx(path)


@pytest.mark.parametrize("cut", [3, 20, -4])
def test_a_gzip_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(500, np.uint8)))[:cut])
    with pytest.raises(UsageError, match="cannot read"):
        read_idx(path)


def test_a_gzip_file_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedgrpc.datasets.fashion_mnist._MOST_BYTES", 1 << 20)
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(UsageError, match="unpacks to more"):
        read_idx(path)


def test_the_installed_fashion_mnist_has_its_published_size() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = load_fashion_mnist()
    assert data.train.inputs.shape == (60000, 28, 28)
    assert np.bincount(data.held_out.labels).tolist() == [1000] * 10


def test_digits_hold_out_a_fifth_of_every_digit() -> None:
    data = load_digits()
    assert (len(data.train), len(data.held_out)) == (1442, 355)
    assert set(np.bincount(data.held_out.labels).tolist()) <= {34, 35, 36}
    assert (data.train.inputs.shape[1:], data.train.inputs.max()) == ((8, 8), 16)


def test_digits_are_scikit_learns_own() -> None:
    from sklearn.datasets import load_digits as reference

    ours, theirs = load_digits(), reference()
    rows = np.concatenate([ours.train.inputs, ours.held_out.inputs]).reshape(-1, 64)
    labels = np.concatenate([ours.train.labels, ours.held_out.labels])
    assert sorted(map(tuple, np.c_[rows, labels].tolist())) == sorted(
        map(tuple, np.c_[theirs.data.astype(int), theirs.target].tolist())
    )


def test_reading_data_imports_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys, fedgrpc.datasets.shares as s; s.load_named('digits', None);"
        "assert not {'torch', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def small_data() -> LabelledData:
    labels = np.arange(60) % 10
    examples = Examples(np.arange(60 * 4, dtype=np.uint8).reshape(60, 2, 2), labels)
    return LabelledData(examples, examples.take(np.arange(30)))


def test_a_share_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    partition = parse_partition("dirichlet:0.5")
    paths = write_shares(tmp_path / "new", small_data(), partition, 3, seed=1)
    assert [path.name for path in paths] == ["part-1-of-3.npz", "part-2-of-3.npz", "part-3-of-3.npz"]
    for index, path in enumerate(paths):
        share, read = take_share(small_data(), partition, index, 3, 1), load_share(path)
        assert np.array_equal(read.train.inputs, share.train.inputs)
        assert np.array_equal(read.held_out.labels, share.held_out.labels)
    assert sum(len(load_share(path).train) for path in paths) == 60


def test_a_share_stands_in_for_its_data_set(tmp_path: Path) -> None:
    save_share(tmp_path / "mine.npz", small_data())
    assert len(load_named("cifar10", tmp_path / "mine.npz").train) == 60


def test_files_that_are_no_share_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    evil = np.array([{"a": 1}], dtype=object)
    np.savez(
        tmp_path / "pickled.npz", train_inputs=evil, train_labels=evil, held_out_inputs=evil, held_out_labels=evil
    )
    np.savez(
        tmp_path / "uneven.npz", train_inputs=np.zeros((3, 2)), train_labels=np.zeros(2),
        held_out_inputs=np.zeros((1, 2)), held_out_labels=np.zeros(1),
    )  # fmt: skip
    for name in ("text", "other", "pickled", "uneven", "missing"):
        with pytest.raises(UsageError, match=name):
            load_share(tmp_path / f"{name}.npz")


def test_unknown_data_and_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose digits"):
        load_named("imagenet", None)
    with pytest.raises(UsageError, match="--data names the folder"):
        load_named("digits", tmp_path / "gone")


def test_shares_are_written_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedgrpc.datasets.shares", "digits", "--to", str(tmp_path), "--parts"]
    shown = subprocess.run([*command, "2"], check=True, capture_output=True, text=True).stdout.split()
    assert [Path(line).exists() for line in shown] == [True, True]
    refused = subprocess.run([*command, "2", "--partition", "x"], capture_output=True, text=True)
    assert (refused.returncode, "partition 'x' must be" in refused.stderr) == (2, True)

"""Shares: files with one part of a data set, each for one device.

`python -m fedgrpc.datasets.shares fashion_mnist --parts 10 --partition dirichlet:0.5 --to shares` writes ten such
files; a worker started with `--data shares/part-3-of-10.npz` then holds nothing but its own part.
"""

from __future__ import annotations

import argparse
import io
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedgrpc.datasets.cifar10 import load_cifar10
from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import PARTITIONS, FeatureNoise, Partition, parse_partition
from fedgrpc.errors import UsageError
from fedgrpc.storage.files import write_file

_ARRAYS = ("train_inputs", "train_labels", "held_out_inputs", "held_out_labels")


def take_share(data: LabelledData, partition: Partition, index: int, parts: int, seed: int) -> LabelledData:
    """Take part `index` (from 0) of the training and of the held-out examples, both split with the same seed.

    Parts of an empty set are empty. Feature noise is on training inputs alone.
    """

    def part_of(examples: Examples) -> Examples:
        if not len(examples):
            return examples
        return examples.take(partition.split(_keys(examples, partition), parts, seed)[index])

    train = part_of(data.train)
    if isinstance(partition, FeatureNoise):
        train = replace(train, inputs=partition.noisy(train.inputs, index, parts, seed))
    return LabelledData(train, part_of(data.held_out))


def _keys(examples: Examples, partition: Partition) -> np.ndarray:
    """Return what the partition looks at. Raises `UsageError` where groups are wanted and not known."""
    if not partition.by_group:
        return examples.labels
    if examples.groups is None:
        raise UsageError(
            "this data set does not tell which examples belong together, as a partition by groups needs"
        )
    return examples.groups


def save_share(path: Path, share: LabelledData) -> None:
    """Write a share as an .npz file, atomically and durably. Raises OSError."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        train_inputs=share.train.inputs,
        train_labels=share.train.labels,
        held_out_inputs=share.held_out.inputs,
        held_out_labels=share.held_out.labels,
    )
    write_file(path, content.getbuffer())


def load_share(path: Path) -> LabelledData:
    """Read a file of `save_share`.

    Raises:
        UsageError: the file is missing, unreadable, or no share.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in _ARRAYS]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            # NumPy returns a member without the header of an array as bytes.
            raise ValueError("a member is no array")
    except ValueError as error:
        # NumPy's own message would explain how to run code that the file may hold.
        raise UsageError(f"cannot read the share {path}: it is no .npz file of plain arrays") from error
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"cannot read the share {path}: {error}") from error
    except (NotImplementedError, RuntimeError, MemoryError) as error:
        # A damaged directory names methods of compression, passwords or sizes that `save_share` never writes.
        raise UsageError(f"cannot read the share {path}: it is damaged ({error})") from error
    train_inputs, train_labels, held_out_inputs, held_out_labels = arrays
    for inputs, labels in ((train_inputs, train_labels), (held_out_inputs, held_out_labels)):
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            shape = list(labels.shape)
            raise UsageError(
                f"{path} is no share: its labels are {labels.dtype}{shape}, not one whole number each"
            )
        if inputs.ndim < 1 or len(inputs) != len(labels):
            raise UsageError(f"{path} is no share: it has not one label for each input")
    return LabelledData(_examples(train_inputs, train_labels), _examples(held_out_inputs, held_out_labels))


def _examples(inputs: np.ndarray, labels: np.ndarray) -> Examples:
    """Convert to this machine's byte order, since torch accepts no other."""
    return Examples(inputs.astype(inputs.dtype.newbyteorder("="), copy=False), labels.astype(np.int64, copy=False))


def write_shares(folder: Path, data: LabelledData, partition: Partition, parts: int, seed: int) -> list[Path]:
    """Write every part into `folder` as part-1-of-N.npz and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{index + 1}-of-{parts}.npz" for index in range(parts)]
    for index, path in enumerate(paths):
        save_share(path, take_share(data, partition, index, parts, seed))
    return paths


def load_named(name: str, path: Path | None) -> LabelledData:
    """Load `digits`, `fashion_mnist` or `cifar10` from its own files, or a share of it from an .npz file.

    Raises:
        UsageError: there is no such data set, or its files are missing or malformed.
    """
    if path is not None and path.suffix == ".npz":
        return load_share(path)
    if path is not None and not path.exists():
        raise UsageError(f"there is no {path}; --data names the folder or file of {name}")
    if name == "digits":
        return load_digits()
    if name == "fashion_mnist":
        return load_fashion_mnist(path)
    if name == "cifar10":
        return load_cifar10(path)
    raise UsageError(f"there is no data set {name!r}: choose digits, fashion_mnist or cifar10")


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedgrpc.datasets.shares", description=__doc__)
    parser.add_argument("dataset", choices=["digits", "fashion_mnist", "cifar10"])
    parser.add_argument("--data", type=Path, help="folder of the data set's files")
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--partition", default="iid", help=PARTITIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, required=True, help="folder to write the shares into")
    asked = parser.parse_args()
    try:
        partition = parse_partition(asked.partition)
        data = load_named(asked.dataset, asked.data)
        for path in write_shares(asked.to, data, partition, asked.parts, asked.seed):
            print(path)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()

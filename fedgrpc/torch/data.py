"""Local data of a `TorchTask`: read, checked, partitioned, cut into batches, and read again once it has changed.

The rule: a task trains on what `data()` returns when the task starts. A mistake in `data()` is reported in one
line when the trainer is built, not in the middle of a round. Batches of a `TensorDataset` are cut out of resident
tensors in one operation each. Only other data sets pay for Python on every item.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import structlog
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedgrpc.datasets.partition import FeatureNoise, Partition, parse_part, parse_partition
from fedgrpc.errors import TaskError, UsageError
from fedgrpc.trainer import LocalExamples, TaskSetup

# Largest share of an accelerator's free memory that the data may take. The rest is for model and activations.
_RESIDENT_SHARE = 0.25
_UNREAD = object()

log = structlog.get_logger()


class DataTask(Protocol):
    """Part of a learning task that provides data. `TorchTask` documents the methods."""

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]: ...
    def data_version(self, path: Path | None) -> object: ...


class LocalData:
    """Training examples (`train`) and examples to score with (`held_out`, perhaps none), as batches."""

    train: Batches
    held_out: Batches

    def __init__(self, task: DataTask, setup: TaskSetup, device: torch.device) -> None:
        """Read the data. Raises UsageError without any example, TaskError for anything but data sets."""
        self._task = task
        self._setup = setup
        self._device = device
        self._version: object = _UNREAD
        # The parts of each data set, by partition and number of parts: cut once for all who ask for a part.
        self._parts: dict[tuple[str, int, bool], list[np.ndarray]] = {}
        self._read()
        if not len(self.train) and not len(self.held_out):
            raise UsageError(
                f"{_named(task)}.data() gives no examples{self._place}, neither to train on nor to score"
            )

    def refresh(self) -> None:
        """Read the data again if it has changed. Raises what `data()` raises; the next call then tries again."""
        if self._task.data_version(self._setup.data) != self._version:
            self._read()
            log.info("data read again", train=len(self.train), held_out=len(self.held_out))

    def examples(self) -> LocalExamples:
        """Return how many examples there are to train on now. Raises as `refresh`."""
        self.refresh()
        return LocalExamples(len(self.train), self._version, len(self.held_out))

    def for_part(self, partition: str, part: str) -> LocalData:
        """Return the part of a worker with `--partition` and `--part`, of data that is read here once for all.

        Raises UsageError for a partition or a part that cannot be.
        """
        other = copy.copy(self)
        other._setup = replace(self._setup, partition=partition, part=part)
        index, parts = parse_part(part)
        rule, seed = parse_partition(partition), self._setup.seed

        def part_of(dataset: Dataset[Any], held_out: bool) -> Dataset[Any]:
            key = partition, parts, held_out
            if key not in self._parts:
                self._parts[key] = _split(dataset, rule, parts, seed)
            return subset_of(dataset, self._parts[key][index]) if size_of(dataset) else dataset

        train = _with_noise(part_of(self._train, False), rule, index, parts, seed)
        other._take(train, part_of(self._held_out, True))
        return other

    def labels(self) -> np.ndarray:
        """Return the labels of the training examples. Raises TaskError where targets are no labels."""
        return labels_of(self._train)

    def check_trainable(self) -> None:
        """Raise UsageError unless there is something to train on."""
        if not len(self.train):
            raise UsageError(
                f"there are no training examples{self._place}; "
                "a device with held-out examples alone works with --role evaluator"
            )

    @property
    def _place(self) -> str:
        return "" if self._setup.data is None else f" in {self._setup.data}"

    def _read(self) -> None:
        # The version is taken first, so that a change during the reading is noticed by the next task. The old data
        # is released before the new is read, because a small device may have no room for both.
        version = self._task.data_version(self._setup.data)
        self._version = _UNREAD
        self.train = self.held_out = nothing = _Nothing()
        self._train: Dataset[Any] = nothing
        self._held_out: Dataset[Any] = nothing
        self._parts.clear()
        train, held_out = _data_of(self._task, self._setup.data)
        _check_item(self._task, "to train on", train)
        _check_item(self._task, "to score with", held_out)
        self._take(*_share(train, held_out, self._setup))
        self._version = version

    def _take(self, train: Dataset[Any], held_out: Dataset[Any]) -> None:
        self._train, self._held_out = train, held_out
        self.train, self.held_out = batches_of(train, self._device), batches_of(held_out, self._device)


class _Nothing(Dataset[Any]):
    """No examples."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Batches`."""
        raise IndexError


def _named(task: DataTask) -> str:
    return type(task).__name__


def _data_of(task: DataTask, path: Path | None) -> tuple[Dataset[Any], Dataset[Any]]:
    """Call the task's `data()`. Raises TaskError for anything but two data sets."""
    found: Any = task.data(path)
    if not isinstance(found, tuple | list) or len(found) != 2 or not _indexable(found[0]):
        raise TaskError(
            f"{_named(task)}.data() must return two data sets, one to train on and one to score with "
            f"(or None), each with a length and items (input, target); it returned a {type(found).__name__}"
        )
    train, held_out = found
    if held_out is not None and not _indexable(held_out):
        raise TaskError(f"{_named(task)}.data(): what to score with must be a data set or None")
    return train, _Nothing() if held_out is None else held_out


def _indexable(found: object) -> bool:
    return hasattr(found, "__len__") and hasattr(found, "__getitem__")


def _check_item(task: DataTask, purpose: str, dataset: Dataset[Any]) -> None:
    """Check that the first item is an input and a target that collate to tensors. Raises TaskError."""
    if not size_of(dataset):
        return
    item: Any = dataset[0]
    wanted = f"{_named(task)}.data() must give items (input, target)"
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TaskError(f"{wanted}; the first one {purpose} is {_described(item)}")
    for name, value in zip(("input", "target"), item, strict=True):
        if not _is_tensor(value):
            found = f"the {name} of the first one {purpose} is {_described(value)}"
            raise TaskError(f"{wanted}, each a tensor, array or number; {found}")


def _is_tensor(value: Any) -> bool:
    try:
        return isinstance(default_collate([value]), Tensor)
    except (TypeError, RuntimeError, ValueError):
        return False


def _described(item: Any) -> str:
    """Name an item: `a dict with 'input_ids', 'labels'`, `a tuple of 3`, `a str`."""
    kind = f"a {type(item).__name__}"
    if hasattr(item, "keys"):
        return f"{kind} with {', '.join(repr(str(key)[:40]) for key in list(item.keys())[:5]) or 'nothing'}"
    return f"{kind} of {len(item)}" if isinstance(item, tuple | list) else kind


def _share(train: Dataset[Any], held_out: Dataset[Any], setup: TaskSetup) -> tuple[Dataset[Any], Dataset[Any]]:
    """Take this worker's part of common data, if the worker has `--partition` and `--part`."""
    if setup.partition is None or setup.part is None:
        return train, held_out
    partition, (index, parts) = parse_partition(setup.partition), parse_part(setup.part)

    def part_of(dataset: Dataset[Any]) -> Dataset[Any]:
        if not size_of(dataset):
            return dataset
        return subset_of(dataset, _split(dataset, partition, parts, setup.seed)[index])

    return _with_noise(part_of(train), partition, index, parts, setup.seed), part_of(held_out)


def _split(dataset: Dataset[Any], partition: Partition, parts: int, seed: int) -> list[np.ndarray]:
    """Return the indices of each part; none of an empty data set."""
    if not size_of(dataset):
        return []
    if partition.by_group:
        return partition.split(_groups_of(dataset), parts, seed)
    labels = labels_of(dataset) if partition.by_label else np.zeros(size_of(dataset), np.int64)
    return partition.split(labels, parts, seed)


def _groups_of(dataset: Dataset[Any]) -> np.ndarray:
    """Return the group of each example. Raises `UsageError` for a data set without `groups`."""
    groups = getattr(dataset, "groups", None)
    if groups is None:
        raise UsageError("a partition by groups needs a data set with `groups`, one for each example")
    return np.asarray(groups)


def _with_noise(dataset: Dataset[Any], partition: Partition, index: int, parts: int, seed: int) -> Dataset[Any]:
    """Add the feature noise of a part to its training examples. Raises `UsageError` for other than tensors."""
    if not isinstance(partition, FeatureNoise) or not size_of(dataset):
        return dataset
    if not isinstance(dataset, TensorDataset):
        raise UsageError("a partition with feature noise needs a TensorDataset")
    inputs, *others = dataset.tensors
    return TensorDataset(torch.from_numpy(partition.noisy(inputs.numpy(), index, parts, seed)), *others)


class Batches(Protocol):
    """A finite set of (input, target) examples, read in batches."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets at `indices` (int64), on the device."""
        ...


class TensorBatches:
    """Examples in two tensors, which stay on the device if they fit."""

    def __init__(self, inputs: Tensor, targets: Tensor, device: torch.device) -> None:
        home = device if _fits(inputs, device) else torch.device("cpu")
        self._inputs, self._targets = inputs.to(home), targets.to(home)
        self._device = device

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Batches`."""
        index = torch.from_numpy(indices).to(self._inputs.device)
        inputs, targets = self._inputs.index_select(0, index), self._targets.index_select(0, index)
        return inputs.to(self._device), targets.to(self._device)


class ItemBatches:
    """Examples of any indexable data set, collated item by item."""

    def __init__(self, dataset: Dataset[Any], device: torch.device) -> None:
        self._dataset = dataset
        self._device = device

    def __len__(self) -> int:
        return len(cast(Sequence[Any], self._dataset))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Batches`."""
        inputs, targets = default_collate([self._dataset[int(index)] for index in indices])
        return inputs.to(self._device), targets.to(self._device)


def batches_of(dataset: Dataset[Any], device: torch.device) -> Batches:
    """Choose the fastest way to read `dataset`."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return TensorBatches(dataset.tensors[0], dataset.tensors[1], device)
    return ItemBatches(dataset, device)


def size_of(dataset: Dataset[Any]) -> int:
    """Count the examples."""
    return len(cast(Sequence[Any], dataset))


def labels_of(dataset: Dataset[Any]) -> np.ndarray:
    """Return each example's label [N], from the data set's tensors or `targets` where it has them."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1].numpy()
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        return np.asarray(targets)
    items = cast(Sequence[Any], dataset)
    return np.array([int(items[index][1]) for index in range(len(items))])


def subset_of(dataset: Dataset[Any], indices: np.ndarray) -> Dataset[Any]:
    """Return the examples at `indices`. Tensors are copied, so that the rest can be freed."""
    if isinstance(dataset, TensorDataset):
        index = torch.from_numpy(indices)
        return TensorDataset(*(tensor.index_select(0, index) for tensor in dataset.tensors))
    return Subset(dataset, indices.tolist())


def _fits(tensor: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return tensor.nbytes < _RESIDENT_SHARE * free_bytes


def choose_device(name: str) -> torch.device:
    """Return the torch device of that name. `auto` is CUDA if there is one (as on a Jetson), else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}: choose auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is asked for, but torch finds {torch.cuda.device_count()} CUDA devices")
    return device

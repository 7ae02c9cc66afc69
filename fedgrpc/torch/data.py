"""Local data of a `TorchTask`: read, checked, partitioned, cut into batches, and read again once it has changed.

The rule: a task trains on what `data()` returns when the task starts. A mistake in `data()` is reported in one
line when the trainer is built, not in the middle of a round.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import structlog
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from fedgrpc.datasets.partition import FeatureNoise, Partition, parse_part, parse_partition
from fedgrpc.errors import TaskError, UsageError
from fedgrpc.torch.batches import (
    LABELS,
    Batches,
    Collating,
    TensorRows,
    batches_of,
    described,
    has_only_tensors,
    has_own_items,
    loader_of,
    overrides,
)
from fedgrpc.trainer import LocalExamples, TaskSetup

_UNREAD = object()

# A data set, or a DataLoader of one.
Source = TypeVar("Source", bound=Any)

log = structlog.get_logger()


class DataTask(Collating, Protocol):
    """Part of a learning task that provides data. `TorchTask` documents the methods."""

    def data(self, path: Path | None) -> tuple[Any, Any]: ...
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
        # All parts share the tensors, which noise changes, and which a device of its own gets a copy of.
        shared = self._device.type == "cpu" and not isinstance(rule, FeatureNoise)

        def part_of(dataset: Any, held_out: bool) -> Any:
            key = partition, parts, held_out
            if key not in self._parts:
                self._parts[key] = _split(dataset, rule, parts, seed)
            if not size_of(dataset):
                return dataset
            rows = self._parts[key][index]
            if shared and isinstance(dataset, TensorDataset) and not has_own_items(dataset):
                return TensorRows(dataset, rows)
            return subset_of(dataset, rows)

        train = _with_noise(part_of(self._train, False), rule, index, parts, seed)
        other._take(train, part_of(self._held_out, True))
        return other

    def labels(self) -> np.ndarray:
        """Return the labels of the training examples. Raises TaskError where targets are no labels."""
        return labels_of(self._train)

    @property
    def loader_processes(self) -> int:
        """Most processes that a `DataLoader` of the task starts."""
        loaders = [each for each in (self._train, self._held_out) if isinstance(each, DataLoader)]
        return max((loader.num_workers for loader in loaders), default=0)

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
        self._parts.clear()
        self._take(_Nothing(), _Nothing())
        train, held_out = _data_of(self._task, self._setup.data)
        _check_item(self._task, "to train on", train)
        _check_item(self._task, "to score with", held_out)
        self._take(*_share(train, held_out, self._setup))
        self._version = version

    def _take(self, train: Any, held_out: Any) -> None:
        self._train, self._held_out = train, held_out
        self.train = batches_of(train, self._device, self._task)
        self.held_out = batches_of(held_out, self._device, self._task)


class _Nothing(Dataset[Any]):
    """No examples."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


def _named(task: DataTask) -> str:
    return type(task).__name__


def _data_of(task: DataTask, path: Path | None) -> tuple[Any, Any]:
    """Call the task's `data()`. Raises TaskError for anything but two data sets."""
    found: Any = task.data(path)
    if not isinstance(found, tuple | list) or len(found) != 2 or not _readable(found[0]):
        raise TaskError(
            f"{_named(task)}.data() must return two data sets or DataLoaders, one to train on and one to score "
            f"with (or None), each with a length and items (input, target); it returned a {type(found).__name__}"
        )
    train, held_out = found
    if held_out is not None and not _readable(held_out):
        raise TaskError(f"{_named(task)}.data(): what to score with must be a data set, a DataLoader or None")
    return train, _Nothing() if held_out is None else held_out


def _readable(found: Any) -> bool:
    examples = found.dataset if isinstance(found, DataLoader) else found
    return hasattr(examples, "__len__") and hasattr(examples, "__getitem__")


def _check_item(task: DataTask, purpose: str, dataset: Any) -> None:
    """Check that the first item collates to inputs and targets. Raises TaskError, and what the task's code raises.

    Nothing is read of a `DataLoader`: its first batch may start processes.
    """
    if not size_of(dataset) or isinstance(dataset, DataLoader) or overrides(task, "collate"):
        return
    item: Any = dataset[0]
    fits = _collates(item)
    if not overrides(task, "inputs_and_targets"):
        pair = isinstance(item, tuple | list) and len(item) == 2
        fits = fits and (pair or (hasattr(item, "keys") and not set(LABELS).isdisjoint(item.keys())))
        wanted = f"{_named(task)}.data() must give items (input, target), or dicts with 'labels'"
        for name, value in zip(("input", "target"), item if pair else (), strict=False):
            if not _collates(value):
                found = f"the {name} of the first one {purpose} is {described(value)}"
                raise TaskError(f"{wanted}, of tensors, arrays and numbers; {found}; or override collate()")
        if not fits:
            raise TaskError(f"{wanted}; the first one {purpose} is {described(item)}")
    elif not fits:
        raise TaskError(f"{_named(task)}: let collate() make batches of items like {described(item)}")


def _collates(value: Any) -> bool:
    try:
        return has_only_tensors(default_collate([value]))
    except (TypeError, RuntimeError, ValueError):
        return False


def _share(train: Any, held_out: Any, setup: TaskSetup) -> tuple[Any, Any]:
    """Take this worker's part of common data, if the worker has `--partition` and `--part`."""
    if setup.partition is None or setup.part is None:
        return train, held_out
    partition, (index, parts) = parse_partition(setup.partition), parse_part(setup.part)

    def part_of(dataset: Any) -> Any:
        if not size_of(dataset):
            return dataset
        return subset_of(dataset, _split(dataset, partition, parts, setup.seed)[index])

    return _with_noise(part_of(train), partition, index, parts, setup.seed), part_of(held_out)


def _split(dataset: Any, partition: Partition, parts: int, seed: int) -> list[np.ndarray]:
    """Return the indices of each part; none of an empty data set."""
    if not size_of(dataset):
        return []
    if partition.by_group:
        return partition.split(_groups_of(dataset), parts, seed)
    labels = labels_of(dataset) if partition.by_label else np.zeros(size_of(dataset), np.int64)
    return partition.split(labels, parts, seed)


def _groups_of(dataset: Any) -> np.ndarray:
    """Return the group of each example. Raises `UsageError` for a data set without `groups`."""
    groups = getattr(_examples_of(dataset), "groups", None)
    if groups is None:
        raise UsageError("a partition by groups needs a data set with `groups`, one for each example")
    return np.asarray(groups)


def _with_noise(dataset: Source, partition: Partition, index: int, parts: int, seed: int) -> Source:
    """Add the feature noise of a part to its training examples. Raises `UsageError` for other than tensors."""
    if not isinstance(partition, FeatureNoise) or not size_of(dataset):
        return dataset
    examples = _examples_of(dataset)
    if not isinstance(examples, TensorDataset) or has_own_items(examples):
        raise UsageError("a partition with feature noise needs a TensorDataset")
    inputs, *others = examples.tensors
    noisy = TensorDataset(torch.from_numpy(partition.noisy(inputs.numpy(), index, parts, seed)), *others)
    return _like(dataset, noisy)


def _examples_of(dataset: Any) -> Dataset[Any]:
    """Return the data set itself, or that of a `DataLoader`."""
    return dataset.dataset if isinstance(dataset, DataLoader) else dataset


def _like(dataset: Source, examples: Dataset[Any]) -> Source:
    """Return other examples as `dataset` gives its own, with the settings of its `DataLoader`."""
    return cast(Source, loader_of(dataset, examples) if isinstance(dataset, DataLoader) else examples)


def size_of(dataset: Any) -> int:
    """Count the examples."""
    return len(cast(Sequence[Any], _examples_of(dataset)))


def labels_of(dataset: Any) -> np.ndarray:
    """Return each example's label [N], from the data set's tensors or `targets` where it has them."""
    examples = _examples_of(dataset)
    if isinstance(examples, TensorRows):
        return examples.tensors[-1].index_select(0, torch.from_numpy(examples.rows)).numpy()
    if isinstance(examples, TensorDataset):
        return examples.tensors[-1].numpy()
    targets = getattr(examples, "targets", None)
    if targets is not None:
        return np.asarray(targets)
    items = cast(Sequence[Any], examples)
    return np.array([_label_of(items[index]) for index in range(len(items))])


def _label_of(item: Any) -> int:
    names = [name for name in LABELS if name in item] if hasattr(item, "keys") else [1]
    if not names:
        raise UsageError(f"a partition by labels needs items with a label, not {described(item)}")
    return int(item[names[0]])


def subset_of(dataset: Source, indices: np.ndarray) -> Source:
    """Return the examples at `indices`. Tensors are copied, so that the rest can be freed."""
    examples = _examples_of(dataset)
    if isinstance(examples, TensorDataset) and not has_own_items(examples):
        index = torch.from_numpy(indices)
        return _like(dataset, TensorDataset(*(tensor.index_select(0, index) for tensor in examples.tensors)))
    return _like(dataset, Subset(examples, indices.tolist()))


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

"""Batches of a learning task: cut out of tensors, collated item by item, or as its own `DataLoader` gives them.

The rule: a batch is a pair of inputs and targets. Each is a tensor, or a dict, list or tuple of values such as
Hugging Face's tokenizers make, and only its tensors are moved and cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset

from fedgrpc.errors import TaskError, UsageError
from fedgrpc.trainer import TrainJob

# Largest share of an accelerator's free memory that the data may take. The rest is for model and activations.
_RESIDENT_SHARE = 0.25
LABELS: Final = ("labels", "label")

# A tensor, or a dict, list or tuple of such.
Values = Any
Batch = tuple[Values, Values]


def inputs_and_targets(batch: Any) -> Batch:
    """Return both of a pair; of a dict, the rest and its `labels` (or `label`). Raises TaskError for others."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        for name in LABELS:
            if name in batch:
                return {key: value for key, value in batch.items() if key != name}, batch[name]
    raise TaskError(
        f"a batch is {described(batch)}, not inputs and targets; let inputs_and_targets() of the learning task "
        "take it apart"
    )


def described(item: Any) -> str:
    """Name an item: `a dict with 'input_ids', 'labels'`, `a tuple of 3`, `a str`."""
    kind = f"a {type(item).__name__}"
    if hasattr(item, "keys"):
        return f"{kind} with {', '.join(repr(str(key)[:40]) for key in list(item.keys())[:5]) or 'nothing'}"
    return f"{kind} of {len(item)}" if isinstance(item, tuple | list) else kind


def over_tensors(change: Callable[[Tensor], Tensor], values: Values) -> Values:
    """Return `values` with each tensor changed; other leaves stay. Mappings become dicts."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, Mapping):
        return {key: over_tensors(change, value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        each = [over_tensors(change, value) for value in values]
        return type(values)(*each) if hasattr(values, "_fields") else type(values)(each)
    return values


def tensors_in(values: Values) -> Iterator[Tensor]:
    """Yield the tensors of `values`."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def has_only_tensors(values: Values) -> bool:
    """Return whether all leaves are tensors, at least one."""
    if isinstance(values, Mapping):
        return has_only_tensors(list(values.values()))
    if isinstance(values, list | tuple):
        return bool(values) and all(map(has_only_tensors, values))
    return isinstance(values, Tensor)


def moved(values: Values, device: torch.device) -> Values:
    """Return `values` on the device."""
    return over_tensors(lambda tensor: tensor.to(device), values)


def cut(values: Values, part: slice, whole: int) -> Values:
    """Return the examples of a part of a batch of `whole` examples. What has no axis of examples stays."""
    return over_tensors(lambda tensor: tensor[part] if tensor.dim() and len(tensor) == whole else tensor, values)


def count_of(batch: Batch) -> int:
    """Count a batch's examples: the first axis of its targets, or of its inputs where targets have none."""
    inputs, targets = batch
    for tensor in (*tensors_in(targets), *tensors_in(inputs)):
        if tensor.dim():
            return len(tensor)
    raise TaskError("a batch has no tensor with an axis of examples")


Method = TypeVar("Method", bound=Callable[..., Any])


def default(method: Method) -> Method:
    """Mark a method of `TorchTask` as what holds where a task does not override it (`overrides`)."""
    method.is_default = True  # type: ignore[attr-defined]
    return method


def overrides(task: object, name: str) -> bool:
    """Return whether a learning task has a method `name` of its own."""
    method = getattr(task, name, None)
    return method is not None and not getattr(method, "is_default", False)


class Collating(Protocol):
    """Part of a learning task that makes batches of items. `TorchTask` documents the methods."""

    def collate(self, items: list[Any]) -> Any: ...
    def inputs_and_targets(self, batch: Any) -> Batch: ...


class Batches(Protocol):
    """A finite set of examples, read in batches."""

    def __len__(self) -> int: ...

    def training(self, job: TrainJob, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of a training, on the device, as `TrainJob.batches` does. Raises Cancelled."""
        ...

    def steps(self, job: TrainJob, batch_size: int) -> int:
        """Count the batches of a training that is not cut short."""
        ...

    def scoring(self, batch_size: int) -> Iterator[Batch]:
        """Yield all examples once, in their order, on the device."""
        ...

    def first(self, count: int) -> Batch:
        """Return the first examples, at most `count`, on the device."""
        ...


class _Indexed:
    """Batches of examples that are found by their index."""

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: np.ndarray) -> Batch:
        """Return inputs and targets at `indices` (int64), on the device."""
        raise NotImplementedError

    def training(self, job: TrainJob, batch_size: int) -> Iterator[Batch]:
        """See `Batches`."""
        return map(self.batch, job.batches(len(self), batch_size))

    def steps(self, job: TrainJob, batch_size: int) -> int:
        """See `Batches`."""
        return job.total_steps(len(self), batch_size)

    def scoring(self, batch_size: int) -> Iterator[Batch]:
        """See `Batches`."""
        for start in range(0, len(self), batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, len(self))))

    def first(self, count: int) -> Batch:
        """See `Batches`."""
        return self.batch(np.arange(min(count, len(self))))


class TensorBatches(_Indexed):
    """Examples in two tensors, which stay on the device if they fit. `rows` (int64): those examples alone."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, device: torch.device, rows: np.ndarray | None = None
    ) -> None:
        home = device if _fits(inputs, device) else torch.device("cpu")
        self._inputs, self._targets = inputs.to(home), targets.to(home)
        self._device = device
        self._rows = rows

    def __len__(self) -> int:
        return len(self._targets if self._rows is None else self._rows)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `_Indexed`."""
        rows = indices if self._rows is None else self._rows[indices]
        index = torch.from_numpy(rows).to(self._inputs.device)
        inputs, targets = self._inputs.index_select(0, index), self._targets.index_select(0, index)
        return inputs.to(self._device), targets.to(self._device)


class ItemBatches(_Indexed):
    """Examples of any indexable data set, collated item by item as the task says."""

    def __init__(self, dataset: Dataset[Any], device: torch.device, task: Collating) -> None:
        self._dataset, self._device, self._task = dataset, device, task

    def __len__(self) -> int:
        return len(cast(Sequence[Any], self._dataset))

    def batch(self, indices: np.ndarray) -> Batch:
        """See `_Indexed`."""
        collated = self._task.collate([self._dataset[int(index)] for index in indices])
        return cast(Batch, moved(self._task.inputs_and_targets(collated), self._device))


@dataclass(frozen=True)
class LoaderBatches:
    """Batches as a `DataLoader` of the task gives them: its sampler, size, collation and processes count."""

    loader: DataLoader[Any]
    device: torch.device
    task: Collating

    def __len__(self) -> int:
        return len(cast(Sequence[Any], self.loader.dataset))

    def training(self, job: TrainJob, batch_size: int) -> Iterator[Batch]:
        """See `Batches`. The plan's batch size does not count."""
        endless = itertools.chain.from_iterable(itertools.repeat(self.loader))
        for _ in replace(job, batch_size=1).batches(len(self.loader)):
            yield self._parted(next(endless))

    def steps(self, job: TrainJob, batch_size: int) -> int:
        """See `Batches`."""
        return replace(job, batch_size=1).total_steps(len(self.loader))

    def scoring(self, batch_size: int) -> Iterator[Batch]:
        """See `Batches`."""
        return map(self._parted, self.loader)

    def first(self, count: int) -> Batch:
        """See `Batches`."""
        batch = self._parted(next(iter(self.loader)))
        return cast(Batch, cut(batch, slice(0, count), count_of(batch)))

    def _parted(self, batch: Any) -> Batch:
        return cast(Batch, moved(self.task.inputs_and_targets(batch), self.device))


class TensorRows(Subset[Any]):
    """Rows of a `TensorDataset` that stays whole. A `Subset` of a task's own is read item by item."""

    def __init__(self, dataset: TensorDataset, rows: np.ndarray) -> None:
        super().__init__(dataset, cast(Sequence[int], rows))
        self.tensors, self.rows = dataset.tensors, rows


def has_own_items(dataset: Any) -> bool:
    """Return whether a `TensorDataset` makes of its tensors what its class says, as one that augments images."""
    return type(dataset).__getitem__ is not TensorDataset.__getitem__


def batches_of(dataset: Any, device: torch.device, task: Collating) -> Batches:
    """Choose the fastest way to read `dataset`, which may be a `DataLoader`."""
    if isinstance(dataset, DataLoader):
        return LoaderBatches(dataset, device, task)
    if isinstance(dataset, TensorRows) and len(dataset.tensors) == 2:
        return TensorBatches(*dataset.tensors, device, dataset.rows)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2 and not has_own_items(dataset):
        return TensorBatches(*dataset.tensors, device)
    return ItemBatches(dataset, device, task)


def loader_of(loader: DataLoader[Any], dataset: Dataset[Any]) -> DataLoader[Any]:
    """Return a loader of other examples, with the settings of `loader`. Raises `UsageError` for an own sampler."""
    if loader.batch_size is None or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise UsageError(
            "a DataLoader with a sampler of its own cannot be partitioned; return a data set from data(), or "
            "partition it there"
        )
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _fits(tensor: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return tensor.nbytes < _RESIDENT_SHARE * free_bytes

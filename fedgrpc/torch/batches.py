"""Examples by index, a batch at a time.

The rule: batches of a `TensorDataset` are cut out of resident tensors in one operation each; only other data
sets pay for Python on every item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedgrpc.errors import UsageError

_RESIDENT_SHARE = 0.25  # of the accelerator's free memory: the rest is for the model and its activations


class Batches(Protocol):
    """A finite set of (input, target) examples."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets at `indices` (int64), on the device."""
        ...


class TensorBatches:
    """Examples that live in two tensors, on the device where they fit there."""

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
    """The fastest way through `dataset`."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return TensorBatches(dataset.tensors[0], dataset.tensors[1], device)
    return ItemBatches(dataset, device)


def size_of(dataset: Dataset[Any]) -> int:
    """How many examples there are."""
    return len(cast(Sequence[Any], dataset))


def labels_of(dataset: Dataset[Any]) -> np.ndarray:
    """Each example's label [N], for a partition; read from its tensors or `targets` where it has them."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1].numpy()
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        return np.asarray(targets)
    items = cast(Sequence[Any], dataset)
    return np.array([int(items[index][1]) for index in range(len(items))])


def subset_of(dataset: Dataset[Any], indices: np.ndarray) -> Dataset[Any]:
    """The examples at `indices`; of tensors a copy, so that the rest can be freed."""
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
    """`auto` is CUDA where there is one (a Jetson is a CUDA device), else the CPU.

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

"""Base of the ready-made image tasks: data sets and models by name, pixels kept as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.datasets.dataset import Examples
from fedgrpc.datasets.shares import load_named
from fedgrpc.errors import UsageError
from fedgrpc.torch.models import build_model
from fedgrpc.torch.task import TorchTask

_CLASSES = 10


class ImageTask(TorchTask):
    """Classification of square images into ten classes. `--data` is the data set's folder, or a share (.npz)."""

    dataset: str
    image_size: int
    in_channels: int
    brightest: int = 255

    def __init__(self, model: str) -> None:
        self._model_name = model
        self.model()  # reports an unknown name before any data is read

    def model(self) -> nn.Module:
        """Build the model by name, with channels last in memory, where convolution and pooling are faster."""
        model = build_model(
            self._model_name, num_classes=_CLASSES, in_channels=self.in_channels, image_size=self.image_size
        )
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Load pixels as bytes, a quarter of the memory of floats. `prepare` scales each batch."""
        data = load_named(self.dataset, path)
        return self._tensors(data.train, path), self._tensors(data.held_out, path)

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        """Scale pixels to float32 from 0 to 1."""
        return inputs.to(torch.float32, memory_format=torch.channels_last).div_(self.brightest)

    def _tensors(self, examples: Examples, path: Path | None) -> TensorDataset:
        shape = (self.in_channels, self.image_size, self.image_size)
        if not len(examples):
            return TensorDataset(torch.zeros(0, *shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
        inputs = examples.inputs.reshape(len(examples), -1)
        if inputs.shape[1] != shape[0] * shape[1] * shape[2]:
            raise UsageError(f"{path} holds images of {examples.inputs.shape[1:]}, not {self.dataset}'s {shape}")
        if inputs.dtype.kind not in "iu" or _beyond(inputs, self.brightest):
            held = f"{inputs.dtype} pixels, {inputs.min():g} to {inputs.max():g}"
            raise UsageError(f"{path} holds {held}; {self.dataset}'s are whole numbers, 0 to {self.brightest}")
        if _beyond(examples.labels, _CLASSES - 1):
            held = f"labels {examples.labels.min()} to {examples.labels.max()}"
            raise UsageError(f"{path} holds {held}; {self.dataset}'s are 0 to {_CLASSES - 1}")
        # Copied into torch's own memory, because arrays read from a file may be read-only.
        return TensorDataset(torch.tensor(inputs).reshape(-1, *shape), torch.tensor(examples.labels))


def _beyond(values: np.ndarray, most: int) -> bool:
    """Return whether any value is below 0 or above `most`."""
    return bool(values.size) and (int(values.min()) < 0 or int(values.max()) > most)

"""A task in PyTorch: say what the model is and where the data is; the rest has defaults.

    class Flowers(TorchTask):
        learning_rate = 0.05

        def model(self):
            return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

        def data(self, path):
            x, y = read(path)
            return TensorDataset(x[20:], y[20:]), TensorDataset(x[:20], y[:20])

A worker started with `--task flowers:Flowers --data iris.csv` trains it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from fedgrpc.datasets.files import version_of
from fedgrpc.torch.optimizer import MomentumSgd, Optimizer
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup
from fedgrpc.worker.task_loader import constructor_arguments


class TorchTask:
    """Override `model` and `data`; the others where the defaults do not fit.

    A constructor, if there is one, may take `model` (the value of `--model`) and options of its own. The class
    attributes hold where a round's plan leaves the choice to the task.
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32

    def model(self) -> nn.Module:
        """The untrained model, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not define model()")

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """What to train on and, if any, what to score with; items are (input, target).

        A `TensorDataset` trains much faster than others: its batches are cut out whole. Without a training example
        a device can score, without a held-out one it can train.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define data()")

    def data_version(self, path: Path | None) -> object:
        """Asked at the start of each task: when it is no longer what it was, `data` is called again.

        By default it changes with the file, or any file in the folder, that `--data` names; without `--data`,
        never. Override it where the data is elsewhere: return a count of examples, a time, or `object()` to read
        each time.
        """
        return None if path is None else version_of(path)

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        """A batch of inputs as the model wants it: scaled, augmented; called on the device, for each batch."""
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch: cross-entropy."""
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Means over a batch, beside `loss`: accuracy, where the targets are class indices."""
        if targets.is_floating_point():
            return {}
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}

    def optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer:
        """A fresh optimizer for one round: SGD with momentum. Any of `torch.optim` will do."""
        return MomentumSgd(parameters, learning_rate, momentum, weight_decay)

    @classmethod
    def build_trainer(cls, setup: TaskSetup) -> TorchTrainer:
        """What a worker runs: this task, set up as its owner asked."""
        reference = f"{cls.__module__}:{cls.__qualname__}"
        return TorchTrainer(cls(**constructor_arguments(cls, setup, reference, taken=_TAKEN)), setup)


_TAKEN = ("data", "device", "partition", "part", "threads")

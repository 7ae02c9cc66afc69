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
    """Learning task in PyTorch. Override `model` and `data`, and other methods where the defaults do not fit.

    A constructor, if there is one, may take `model` (the value of `--model`) and options of its own. The class
    attributes apply where the training plan leaves the choice to the task.
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32

    def model(self) -> nn.Module:
        """Return the untrained model, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not define model()")

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Return examples to train on, and examples to score with or None; items are (input, target).

        A `TensorDataset` trains much faster than others, because its batches are cut out whole. A device without
        training examples can still score, and one without held-out examples can still train.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define data()")

    def data_version(self, path: Path | None) -> object:
        """Return a value that changes when the data does. `data` is then called again at the start of a task.

        By default the value changes with the file that `--data` names, or with any file in that folder. Override
        it where the data is elsewhere: return a count of examples, a time, or `object()` to read before every
        task.
        """
        return None if path is None else version_of(path)

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        """Scale or augment a batch of inputs, on the device, before the model gets it."""
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch: cross-entropy."""
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return further means over a batch: accuracy, if the targets are class indices."""
        if targets.is_floating_point():
            return {}
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}

    def optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer:
        """Return a fresh optimizer for one round: SGD with momentum. Any of `torch.optim` works."""
        return MomentumSgd(parameters, learning_rate, momentum, weight_decay)

    @classmethod
    def build_trainer(cls, setup: TaskSetup) -> TorchTrainer:
        """Construct the task and the trainer that a worker runs."""
        reference = f"{cls.__module__}:{cls.__qualname__}"
        return TorchTrainer(cls(**constructor_arguments(cls, setup, reference, taken=_TAKEN)), setup)


_TAKEN = ("data", "device", "partition", "part", "threads")

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

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from fedgrpc.datasets.files import version_of
from fedgrpc.torch.batches import default, inputs_and_targets
from fedgrpc.torch.optimizer import MomentumSgd, Optimizer
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup
from fedgrpc.worker.task_loader import constructor_arguments


class TorchTask:
    """Learning task in PyTorch. Override `model` and `data`, and other methods where the defaults do not fit.

    A constructor, if there is one, may take `model` (the value of `--model`) and options of its own. The first
    four class attributes apply where the training plan leaves the choice to the task. The others always do:

        micro_batches    a batch goes through in so many parts, whose gradients are added up: less memory
        checkpoint       blocks of the model keep their inputs alone, and compute the rest again: less memory
        autocast         "bfloat16" or "float16": mixed precision (`torch.autocast`)
        class_weights    a weight for each class in training's cross-entropy, or "balanced" by the labels here
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32
    micro_batches: int = 1
    checkpoint: bool = False
    autocast: str = ""
    class_weights: Sequence[float] | str | None = None

    def model(self) -> nn.Module:
        """Return the untrained model, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not define model()")

    def trainable(self) -> Sequence[str] | None:
        """Return names of the tensors to train, with * and ?; None: all that require a gradient.

        All others are frozen. They travel with the first model that a device gets, and in no update. Layers of
        BatchNorm among them keep their statistics.
        """
        return None

    def data(self, path: Path | None) -> tuple[Any, Any]:
        """Return examples to train on, and examples to score with or None; items are (input, target), or dicts.

        A dict has its target as `labels` or `label`. A `TensorDataset` trains much faster than others, because its
        batches are cut out whole. A `DataLoader` in place of a data set keeps its sampler, collation and batch
        size, whatever the plan says. A device without training examples can still score, and one without held-out
        examples can still train.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define data()")

    def data_version(self, path: Path | None) -> object:
        """Return a value that changes when the data does. `data` is then called again at the start of a task.

        By default the value changes with the file that `--data` names, or with any file in that folder. Override
        it where the data is elsewhere: return a count of examples, a time, or `object()` to read before every
        task.
        """
        return None if path is None else version_of(path)

    @default
    def collate(self, items: list[Any]) -> Any:
        """Make a batch of items, as `collate_fn` of a `DataLoader`. A `DataLoader` has its own."""
        return default_collate(items)

    @default
    def inputs_and_targets(self, batch: Any) -> tuple[Any, Any]:
        """Take a collated batch apart: a pair, or a dict with `labels` or `label`."""
        return inputs_and_targets(batch)

    def prepare(self, inputs: Any, training: bool) -> Any:
        """Scale or augment a batch of inputs, on the device, before the model gets it."""
        return inputs

    def forward(self, model: Callable[..., Any], inputs: Any) -> Any:
        """Return the model's outputs: of a dict by keyword, of a list or tuple by position.

        Of outputs by name, as Hugging Face's models give them, only `logits` are returned.
        """
        if isinstance(inputs, Mapping):
            outputs = model(**inputs)
        else:
            outputs = model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)
        return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs

    @default
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch: cross-entropy."""
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        """Return further means over a batch: accuracy, if the targets are class indices."""
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return {}
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}

    @default
    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return scores of all held-out examples together, such as F1 (`fedgrpc.torch.scores`). By default none.

        Outputs and targets of all are kept in main memory for it, in float32 on the CPU.
        """
        return {}

    @default
    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch to train with, in place of `forward` and `loss`.

        Backward pass and step of the optimizer follow. What changes forward passes, such as number formats and
        early exits, goes with `forward` alone.
        """
        return self.loss(self.forward(model, inputs), targets)

    @default
    def scoring_step(self, model: nn.Module, inputs: Any, targets: Any) -> Mapping[str, Any]:
        """Return means over a batch to score with, in place of `forward`, `loss` and `metrics`."""
        outputs = self.forward(model, inputs)
        return {"loss": self.loss(outputs, targets), **self.metrics(outputs, targets)}

    @default
    def scoring_end(self, model: nn.Module) -> Mapping[str, float]:
        """Return scores of all that `scoring_step` was given. By default none."""
        return {}

    @default
    def schedule(self, round: int, step: int, steps: int) -> float:
        """Return what to multiply the learning rate by in a step, from 0, of `steps` in a round, from 1.

        A function of the round alone is the same on all devices, also on those that missed rounds.
        """
        return 1.0

    def optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer:
        """Return a fresh optimizer for one round: SGD with momentum. Any of `torch.optim` works."""
        return MomentumSgd(parameters, learning_rate, momentum, weight_decay)

    @default
    def optimizer_for(self, model: nn.Module, round: int) -> Optimizer:
        """Return a fresh optimizer for the model in a round, in place of `optimizer`, whatever rate the plan has.

        `fedgrpc.torch.optimizer.in_round` gives it the rate of a scheduler of `torch.optim.lr_scheduler`.
        """
        return self.optimizer(model.parameters(), self.learning_rate, self.momentum, self.weight_decay)

    @classmethod
    def build_trainer(cls, setup: TaskSetup) -> TorchTrainer:
        """Construct the task and the trainer that a worker runs."""
        reference = f"{cls.__module__}:{cls.__qualname__}"
        return TorchTrainer(cls(**constructor_arguments(cls, setup, reference, taken=_TAKEN)), setup)


_TAKEN = ("data", "device", "partition", "part", "threads")

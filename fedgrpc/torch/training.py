"""Training and scoring of one module with a learning task: the loop over batches, and what it measures.

The rule: all that a step needs is an argument. So the model as it is, a local model and its check in float32 go
through the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedgrpc.errors import TaskError
from fedgrpc.submodels.plan import Memory
from fedgrpc.torch.data import Batches, DataTask, LocalData
from fedgrpc.torch.early_exits import Loss, loss_of_exits
from fedgrpc.torch.label_adjustment import LabelAdjustment
from fedgrpc.torch.local_model.levers import micro_batches
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.nested import Nested
from fedgrpc.torch.memory import TensorBytes
from fedgrpc.torch.optimizer import AddedTerm, Optimizer, TrainingStep
from fedgrpc.torch.weights import Names, uncompiled
from fedgrpc.trainer import TrainJob

# Scoring keeps one layer's activations, training all. So twice the batch takes less memory than training does.
_EVALUATION_BATCHES = 2
_EVALUATION_BATCH = 512

Forward = Callable[[Tensor], Tensor]


class LearningTask(DataTask, Protocol):
    """Learning task as the trainer uses it. `TorchTask` documents the methods."""

    learning_rate: float
    momentum: float
    weight_decay: float
    batch_size: int

    def model(self) -> nn.Module: ...
    def prepare(self, inputs: Tensor, training: bool) -> Tensor: ...
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor: ...
    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]: ...
    def optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer: ...


@dataclass(frozen=True)
class TrainingRun:
    """Outcome of one training run. `tensor_bytes` are those of its first step."""

    mean_loss: float
    steps: int
    tensor_bytes: int
    first_loss: float

    def check(self) -> None:
        """Raise TaskError if the first loss is NaN: the cause is the data or the loss, not the training."""
        if math.isnan(self.first_loss):
            raise TaskError("the loss of the very first batch is NaN: look at the inputs and at loss()")


def run_training(
    task: LearningTask,
    data: LocalData,
    job: TrainJob,
    model: nn.Module,
    local: LocalModel | None = None,
    nested: Nested | None = None,
) -> TrainingRun:
    """Train `model` in place, as the local model `local` where there is one, along with the `nested` models."""
    train, plan, forward = data.train, job.local_model, model if local is None else local
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    levers = _levers(job)
    optimizer = _optimizer(task, parameters, job, local)
    scaling = None if local is None else local.loss_scale()
    step = TrainingStep(parameters, optimizer, _term(job, model), scaling)
    loss_of = loss_of_exits(model, _loss(task, data, job), 0.0 if plan is None else plan.distillation)
    # BatchNorm cannot train on a single example, such as the last one of an epoch may be.
    skips_single = len(train) > 1 and _has_batch_norm(model)
    # Losses stay on the device, because reading one each step would make the CPU wait for an accelerator. They
    # are summed at the end, because a small number format could not hold the sum.
    losses: list[Tensor] = []
    examples: list[int] = []
    steps = 0
    memory = TensorBytes(model.parameters())
    for indices in job.batches(len(train), task.batch_size):
        steps += 1
        if len(indices) == 1 and skips_single:
            continue
        inputs, targets = train.batch(indices)
        step.clear()
        prepared = task.prepare(inputs, True)
        for part, share in micro_batches(len(indices), levers.micro_batches):
            own, wanted = (prepared, targets) if share == 1 else (prepared[part], targets[part])
            with memory.counting() if not losses else nullcontext(), _naming_batch(own, wanted):
                loss = loss_of(forward(own), wanted)
                total = _with_nested(loss, nested, loss_of, own, wanted)
            step.backward(total if share == 1 else total * share)
            losses.append(loss.detach())
            examples.append(len(wanted))
        step.take()
    first_loss = float(losses[0]) if losses else 0.0
    return TrainingRun(_mean_loss(losses, examples), steps, memory.total(optimizer), first_loss)


def _loss(task: LearningTask, data: LocalData, job: TrainJob) -> Callable[..., Tensor]:
    """Return the loss to train with, adjusted by labels where the job asks (`LabelAdjustment`)."""
    if not job.label_adjustment:
        return task.loss
    adjusted = LabelAdjustment(data.labels(), job.label_adjustment)
    return lambda outputs, targets: task.loss(adjusted(outputs), targets)


def _term(job: TrainJob, model: nn.Module) -> AddedTerm | None:
    """Return the term of the run's algorithm, which names tensors as the module does."""
    term = job.term()
    if term.is_nothing:
        return None
    module = uncompiled(model)
    own = Names.of(module).own
    return AddedTerm({own.get(name, name): each for name, each in module.named_parameters()}, term)


def _levers(job: TrainJob) -> Memory:
    plan = job.local_model
    return Memory() if plan is None or plan.memory is None else plan.memory


def _optimizer(
    task: LearningTask, parameters: list[nn.Parameter], job: TrainJob, local: LocalModel | None
) -> Optimizer:
    learning_rate = task.learning_rate if job.learning_rate is None else job.learning_rate
    momentum = task.momentum if job.momentum is None else job.momentum
    weight_decay = task.weight_decay if job.weight_decay is None else job.weight_decay
    if not _levers(job).momentum:
        momentum = 0.0

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return task.optimizer(parameters, learning_rate, momentum, weight_decay)

    return make(parameters) if local is None else local.optimizer(parameters, make)


def _with_nested(loss: Tensor, nested: Nested | None, loss_of: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """Add the losses of the narrower models to the model's own."""
    if not nested:
        return loss
    narrow = nested.losses(lambda outputs: loss_of(outputs, targets), inputs.to(loss.dtype))
    return torch.stack([loss, *narrow]).sum()


def _mean_loss(losses: list[Tensor], examples: list[int]) -> float:
    """Average the batches' mean losses over the examples; 0 without any batch."""
    values = np.array(torch.stack(losses).tolist()) if losses else np.zeros(0)
    return float(values @ np.array(examples, np.float64) / max(1, sum(examples)))


@torch.no_grad()
def means(task: LearningTask, model: Forward, held_out: Batches) -> dict[str, float]:
    """Return means of the loss and the task's metrics over the held-out examples."""
    sums: dict[str, Tensor] = {}
    count = max(1, min(_EVALUATION_BATCH, _EVALUATION_BATCHES * task.batch_size))
    for start in range(0, len(held_out), count):
        indices = np.arange(start, min(start + count, len(held_out)))
        inputs, targets = held_out.batch(indices)
        prepared = task.prepare(inputs, False)
        with _naming_batch(prepared, targets):
            outputs = model(prepared)
            found = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
        for name, mean in found.items():
            sums[name] = sums.get(name, torch.zeros((), device=outputs.device)) + mean * len(indices)
    return {name: float(total) / len(held_out) for name, total in sums.items()}


@contextmanager
def _naming_batch(inputs: Tensor, targets: Tensor) -> Iterator[None]:
    """Note the shapes of the batch on an exception, since errors from inside torch do not name them."""
    try:
        yield
    except Exception as error:
        error.add_note(f"inputs {_described(inputs)}, targets {_described(targets)}")
        raise


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())

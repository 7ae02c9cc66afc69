"""Training and scoring of one module with a learning task: the loop over batches, and what it measures.

The rule: all that a step needs is an argument. So the model as it is, a local model and its check in float32 go
through the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedgrpc.errors import TaskError, UsageError
from fedgrpc.submodels.plan import Arithmetic, Memory
from fedgrpc.torch.batches import Batches, Values, count_of, cut, overrides, tensors_in
from fedgrpc.torch.class_weights import weighted_cross_entropy
from fedgrpc.torch.data import DataTask, LocalData
from fedgrpc.torch.early_exits import EarlyExits, Loss, loss_of_exits
from fedgrpc.torch.label_adjustment import LabelAdjustment
from fedgrpc.torch.local_model.formats import parse_format
from fedgrpc.torch.local_model.levers import checkpointed, micro_batches
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.loss_scale import LossScale
from fedgrpc.torch.local_model.nested import Nested
from fedgrpc.torch.memory import KnownBytes, TensorBytes
from fedgrpc.torch.optimizer import AddedTerm, Optimizer, TrainingStep, set_rate_factor
from fedgrpc.torch.weights import Names, uncompiled
from fedgrpc.trainer import TrainJob

# Scoring keeps one layer's activations, training all. So twice the batch takes less memory than training does.
_EVALUATION_BATCHES = 2
_EVALUATION_BATCH = 512

Forward = Callable[..., Any]


class LearningTask(DataTask, Protocol):
    """Learning task as the trainer uses it. `TorchTask` documents the attributes and methods."""

    learning_rate: float
    momentum: float
    weight_decay: float
    batch_size: int
    micro_batches: int
    checkpoint: bool
    autocast: str
    class_weights: Sequence[float] | str | None

    def model(self) -> nn.Module: ...
    def trainable(self) -> Sequence[str] | None: ...
    def prepare(self, inputs: Any, training: bool) -> Any: ...
    def forward(self, model: Forward, inputs: Any) -> Any: ...
    def loss(self, outputs: Any, targets: Any) -> Tensor: ...
    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]: ...
    def score(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]: ...
    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor: ...
    def scoring_step(self, model: nn.Module, inputs: Any, targets: Any) -> Mapping[str, Any]: ...
    def scoring_end(self, model: nn.Module) -> Mapping[str, float]: ...
    def schedule(self, round: int, step: int, steps: int) -> float: ...
    def optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer: ...
    def optimizer_for(self, model: nn.Module, round: int) -> Optimizer: ...


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
    known: KnownBytes | None = None,
) -> TrainingRun:
    """Train `model` in place, as the local model `local` where there is one, along with the `nested` models.

    `known` are the bytes of former trainings of this kind.
    """
    train = data.train
    model.train()
    hold_frozen_norms(task, model)
    every = list(model.parameters())
    parameters = [parameter for parameter in every if parameter.requires_grad]
    levers = _levers(task, job)
    optimizer, made = _optimizer(task, model, parameters, job, local)
    scaling = _loss_scale(task, local)
    step = TrainingStep(parameters, optimizer, _term(job, model), scaling)
    loss_of_batch = _batch_loss(task, data, job, model, local, nested)
    # Losses stay on the device, because reading one each step would make the CPU wait for an accelerator. They
    # are summed at the end, because a small number format could not hold the sum.
    losses: list[Tensor] = []
    examples: list[int] = []
    steps = 0
    memory = TensorBytes(every, known)
    set_rate = _rate_setter(task, data, job, made)
    with _checkpointed(task, model, job):
        for inputs, targets in train.training(job, task.batch_size):
            steps += 1
            count = count_of((inputs, targets))
            # BatchNorm cannot train on a single example, such as the last one of an epoch may be.
            if count == 1 and len(train) > 1 and _has_batch_norm(model):
                continue
            set_rate(steps - 1)
            step.clear()
            prepared = task.prepare(inputs, True)
            for part, share in micro_batches(count, levers.micro_batches):
                own, wanted = (
                    (prepared, targets) if share == 1 else (cut(each, part, count) for each in (prepared, targets))
                )
                counted = nullcontext() if losses else memory.counting((*tensors_in(own), *tensors_in(wanted)))
                with counted, naming_batch(own, wanted):
                    loss, total = loss_of_batch(own, wanted)
                step.backward(total if share == 1 else total * share)
                losses.append(loss.detach())
                examples.append(part.stop - part.start)
            step.take()
    values = torch.stack(losses).tolist() if losses else []
    return TrainingRun(_mean_loss(values, examples), steps, memory.total(optimizer), values[0] if values else 0.0)


def _batch_loss(
    task: LearningTask,
    data: LocalData,
    job: TrainJob,
    model: nn.Module,
    local: LocalModel | None,
    nested: Nested | None,
) -> Callable[[Values, Values], tuple[Tensor, Tensor]]:
    """Return the function that gives a batch's loss, and the loss to train with. Raises `UsageError`."""
    own = overrides(task, "training_step")
    if own:
        _check_own_step(task, model, job, nested)
    distillation = 0.0 if job.local_model is None else job.local_model.distillation
    loss_of = loss_of_exits(model, _loss(task, data, job), distillation)
    forward: Forward = model if local is None else local

    def losses(inputs: Values, targets: Values) -> tuple[Tensor, Tensor]:
        with autocast(task, model, job):
            if own:
                loss = _one_loss(task, task.training_step(model, inputs, targets))
                return loss, loss
            loss = loss_of(task.forward(forward, inputs), targets)
            return loss, _with_nested(loss, nested, loss_of, inputs, targets)

    return losses


def _one_loss(task: LearningTask, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(f"{type(task).__name__}.training_step() must return the mean loss, a tensor of one number")
    return loss.reshape(())


def _check_own_step(task: LearningTask, model: nn.Module, job: TrainJob, nested: Nested | None) -> None:
    """Raise `UsageError` for what only training with `forward` and `loss` can do."""
    plan = job.local_model
    asked = {
        "early exits": isinstance(model, EarlyExits),
        "nested widths": bool(nested),
        "a number format": plan is not None and plan.arithmetic is not None,
        "quantization": plan is not None and plan.quantization is not None,
        "label adjustment": bool(job.label_adjustment),
        "class_weights": task.class_weights is not None,
    }
    if found := [name for name, there in asked.items() if there]:
        raise UsageError(f"{type(task).__name__} has a training_step() of its own, which leaves {found[0]} out")


def hold_frozen_norms(task: LearningTask, model: nn.Module) -> None:
    """Keep the statistics of BatchNorm layers that `trainable()` leaves out: they are part of what is frozen."""
    if task.trainable() is None:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


def _checkpointed(task: LearningTask, model: nn.Module, job: TrainJob) -> AbstractContextManager[None]:
    planned = job.local_model is not None and job.local_model.memory is not None
    asked = task.checkpoint and not (planned and job.local_model.memory.checkpoint)  # type: ignore[union-attr]
    return checkpointed(uncompiled(model)) if asked else nullcontext()


def autocast(task: LearningTask, model: nn.Module, job: TrainJob | None = None) -> AbstractContextManager[Any]:
    """Compute in the task's mixed precision within the block, unless the plan of a local model has a format."""
    planned = job is not None and job.local_model is not None and job.local_model.arithmetic is not None
    if not task.autocast or planned:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, _autocast_dtype(task))


def _autocast_dtype(task: LearningTask) -> torch.dtype:
    found = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(task.autocast)
    if found is None:
        raise UsageError(
            f"autocast of {type(task).__name__} must be 'bfloat16' or 'float16', not {task.autocast!r}"
        )
    return found


def _loss_scale(task: LearningTask, local: LocalModel | None) -> LossScale | None:
    if local is not None and local.has_format:
        return local.loss_scale()
    if task.autocast == "float16":
        # Gradients of activations are in float16, and small ones would be zero.
        return LossScale(Arithmetic("float16", dynamic_loss_scale=True), parse_format("float16"))
    return None


def _rate_setter(
    task: LearningTask, data: LocalData, job: TrainJob, made: Sequence[Optimizer]
) -> Callable[[int], None]:
    """Return the function that sets the learning rate of a step, counted from 0."""
    if not overrides(task, "schedule"):
        return lambda step: None
    steps = data.train.steps(job, task.batch_size)

    def set_rate(step: int) -> None:
        factor = task.schedule(job.round, step, steps)
        for optimizer in made:
            set_rate_factor(optimizer, factor)

    return set_rate


def _loss(task: LearningTask, data: LocalData, job: TrainJob) -> Callable[..., Tensor]:
    """Return the loss to train with: with the task's class weights and the job's label adjustment."""
    loss: Loss = task.loss
    if task.class_weights is not None:
        if overrides(task, "loss"):
            raise UsageError(
                f"class_weights are for cross-entropy, and {type(task).__name__} has a loss of its own"
            )
        loss = weighted_cross_entropy(task.class_weights, data.labels)
    if not job.label_adjustment:
        return loss
    adjusted = LabelAdjustment(data.labels(), job.label_adjustment)
    return lambda outputs, targets: loss(adjusted(outputs), targets)


def _term(job: TrainJob, model: nn.Module) -> AddedTerm | None:
    """Return the term of the run's algorithm, which names tensors as the module does."""
    term = job.term()
    if term.is_nothing:
        return None
    module = uncompiled(model)
    own = Names.of(module).own
    return AddedTerm({own.get(name, name): each for name, each in module.named_parameters()}, term)


def _levers(task: LearningTask, job: TrainJob) -> Memory:
    plan = job.local_model
    asked = Memory() if plan is None or plan.memory is None else plan.memory
    if asked.micro_batches > 1 or task.micro_batches == asked.micro_batches:
        return asked
    return replace(asked, micro_batches=task.micro_batches)


def _optimizer(
    task: LearningTask, model: nn.Module, parameters: list[nn.Parameter], job: TrainJob, local: LocalModel | None
) -> tuple[Optimizer, list[Optimizer]]:
    """Return the optimizer, and those that the task has made for it."""
    if overrides(task, "optimizer_for"):
        if local is not None and local.has_format:
            raise UsageError(f"{type(task).__name__} has an optimizer_for(), which knows no number format")
        own = task.optimizer_for(model, job.round)
        return own, [own]
    learning_rate = task.learning_rate if job.learning_rate is None else job.learning_rate
    momentum = task.momentum if job.momentum is None else job.momentum
    weight_decay = task.weight_decay if job.weight_decay is None else job.weight_decay
    if not _levers(task, job).momentum:
        momentum = 0.0
    made: list[Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        made.append(task.optimizer(parameters, learning_rate, momentum, weight_decay))
        return made[-1]

    return make(parameters) if local is None else local.optimizer(parameters, make), made


def _with_nested(loss: Tensor, nested: Nested | None, loss_of: Loss, inputs: Values, targets: Values) -> Tensor:
    """Add the losses of the narrower models. Raises `UsageError` for inputs of several tensors."""
    if not nested:
        return loss
    if not isinstance(inputs, Tensor):
        raise UsageError("nested widths are for learning tasks whose inputs are one tensor")
    narrow = nested.losses(lambda outputs: loss_of(outputs, targets), inputs.to(loss.dtype))
    return torch.stack([loss, *narrow]).sum()


def _mean_loss(losses: list[float], examples: list[int]) -> float:
    """Average the batches' mean losses over the examples; 0 without any batch."""
    return float(np.array(losses, np.float64) @ np.array(examples, np.float64) / max(1, sum(examples)))


@torch.no_grad()
def scores_of(task: LearningTask, model: nn.Module, forward: Forward, held_out: Batches) -> dict[str, float]:
    """Return means of the loss and the task's metrics over the held-out examples, and scores of all of them.

    `forward` computes the outputs of `model`, or of a local model of it.
    """
    sums: dict[str, Tensor] = {}
    seen = 0
    whole = _Collected() if overrides(task, "score") else None
    own = overrides(task, "scoring_step")
    count = max(1, min(_EVALUATION_BATCH, _EVALUATION_BATCHES * task.batch_size))
    for inputs, targets in held_out.scoring(count):
        prepared = task.prepare(inputs, False)
        examples = count_of((inputs, targets))
        with naming_batch(prepared, targets), autocast(task, model):
            if own:
                found = dict(task.scoring_step(model, prepared, targets))
            else:
                outputs = task.forward(forward, prepared)
                found = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
                if whole is not None:
                    whole.add(outputs, targets)
        for name, mean in found.items():
            value = torch.as_tensor(mean)
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value * examples
        seen += examples
    scored = {name: float(total) / max(1, seen) for name, total in sums.items()}
    if own:
        scored |= task.scoring_end(model)
    return scored if whole is None else {**scored, **task.score(*whole.joined())}


class _Collected:
    """Outputs and targets of a whole evaluation, in main memory."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Any, targets: Any) -> None:
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            raise TaskError("score() is for tasks whose outputs and targets are one tensor each; see forward()")
        self._parts.append((outputs.float().cpu(), targets.cpu()))

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return both, [N, ...]."""
        outputs, targets = zip(*self._parts, strict=True)
        return torch.cat(outputs), torch.cat(targets)


@contextmanager
def naming_batch(inputs: Values, targets: Values) -> Iterator[None]:
    """Note the shapes of the batch on an exception, since errors from inside torch do not name them."""
    try:
        yield
    except Exception as error:
        error.add_note(f"inputs {_described(inputs)}, targets {_described(targets)}")
        raise


def _described(values: Values) -> str:
    if isinstance(values, Mapping):
        return "{" + ", ".join(f"{name}: {_described(value)}" for name, value in values.items()) + "}"
    found = [f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors_in(values)]
    return ", ".join(found) or type(values).__name__


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())

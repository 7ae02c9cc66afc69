"""`Trainer` for a `TorchTask`: the model of each call is built for its weights, trained and dropped.

The rule: on a CPU, equal weights, data and job give equal results, whatever ran before.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedgrpc.codec.layout import Layout, TensorRole
from fedgrpc.errors import TaskError, TaskUnfit
from fedgrpc.submodels.channels import ChannelMap, SubModel
from fedgrpc.submodels.plan import LocalModelPlan, Memory
from fedgrpc.torch.building import ModuleBuilder
from fedgrpc.torch.data import Batches, DataTask, LocalData, choose_device
from fedgrpc.torch.label_adjustment import LabelAdjustment
from fedgrpc.torch.local_model.levers import micro_batches
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.nested import Nested
from fedgrpc.torch.local_model.noise import noise_ratio
from fedgrpc.torch.local_model.slicing import SubModels
from fedgrpc.torch.memory import TensorBytes
from fedgrpc.torch.optimizer import Optimizer, TrainingStep
from fedgrpc.torch.weights import named_tensors, taken_weights, tensor_roles, uncompiled, weights_of
from fedgrpc.trainer import EvalResult, LocalExamples, TaskSetup, TrainJob, TrainResult, Weights, weight_shapes

# Scoring keeps one layer's activations, training all. So twice the batch takes less memory than training does.
_EVALUATION_BATCHES = 2
_EVALUATION_BATCH = 512
# BatchNorm cannot train on one example.
_FEW = 2

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


class TorchTrainer:
    """`fedgrpc.trainer.Trainer` of a task. A lock lets one call run at a time."""

    def __init__(self, task: LearningTask, setup: TaskSetup) -> None:
        self._task = task
        self._device = choose_device(setup.device)
        self._lock = threading.Lock()
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self._data = LocalData(task, setup, self._device)
        self._seed = setup.seed
        self._builder = ModuleBuilder(self._build, self._device)
        self._sub_models = SubModels(self._builder, self._example)

    def for_part(self, partition: str, part: str) -> TorchTrainer:
        """See `fedgrpc.trainer.for_part`: model and data are those of this trainer."""
        other = copy.copy(self)
        other._data = self._data.for_part(partition, part)
        return other

    def _build(self) -> nn.Module:
        with _seeded(self._device, self._seed):
            return _model_of(self._task)

    def initial_weights(self) -> Weights:
        """Build the whole model, and return its untrained weights, equal on all workers with the same seed."""
        with self._lock:
            return taken_weights(self._builder.initial())

    def layout(self) -> Layout:
        """Return the layout of the whole model, which need not be built for it."""
        return self._builder.layout

    def roles(self) -> Mapping[str, TensorRole]:
        """Return the roles of the model's buffers."""
        return tensor_roles(self._builder.module)

    def tied_names(self) -> Mapping[str, tuple[str, ...]]:
        """Return the further names of tied weights."""
        return self._builder.names.tied

    def local_examples(self) -> LocalExamples:
        """Return the examples that there are to train on now, read again if they have changed."""
        with self._lock:
            return self._data.examples()

    def channels(self) -> ChannelMap:
        """Find the channel groups of the model by scoring an example. Raises UsageError."""
        with self._lock, _seeded(self._device, 0):
            return self._sub_models.channels.map

    def full_width_tensors(self) -> list[tuple[list[str], str]]:
        """Return the tensors that no width makes narrower, grouped by reason, without the model's output."""
        with self._lock, _seeded(self._device, 0):
            return self._sub_models.channels.by_reason

    def activation_bytes(self, width: float = 1.0) -> int:
        """Return the bytes that a backward pass of that width keeps for a batch; 0 is unknown.

        Two examples tell how many, and zeros in place of weights, so that this takes less memory than training.
        """
        if self._builder.whole is not None or len(self._data.train) < _FEW:
            return 0
        with self._lock, _seeded(self._device, 0):
            inputs, targets = self._data.train.batch(np.arange(_FEW))
            prepared = self._task.prepare(inputs, True).cpu()
            module = self._sub_models.blank(SubModel(width)).train()
            memory = TensorBytes(module.parameters())
            with memory.counting():
                self._task.loss(module(prepared), targets.cpu())
        return memory.kept * min(self._task.batch_size, len(self._data.train)) // _FEW

    def _example(self) -> Tensor:
        examples = self._data.train if len(self._data.train) else self._data.held_out
        inputs, _ = examples.batch(np.arange(min(2, len(examples))))
        return self._task.prepare(inputs, False)

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Train on mini-batches, as FedProx (arXiv 1812.06127) with `proximal_mu`.

        Weights of a sub-model train a narrower model. With `local_model`, the local model of that plan is trained.
        """
        with self._lock, _seeded(self._device, job.seed, job.round):
            self._data.refresh()
            self._data.check_trainable()
            own = self._builder.names.to_own(weights)
            module = self._sub_models.loaded(own)
            if job.local_model is not None:
                result = self._train_local(module, own, job, job.local_model)
            else:
                ran = self._run(job, module)
                ran.check()
                metrics = {"loss": ran.mean_loss}
                result = TrainResult(
                    self._trained(module, own),
                    len(self._data.train),
                    ran.steps,
                    metrics,
                    tensor_bytes=ran.tensor_bytes,
                )
        _check_finite(result.weights, own)
        return self._builder.names.to_given(result, weights)

    def _trained(self, module: nn.Module, given: Weights) -> dict[str, np.ndarray]:
        """Return the module's weights: copies if it is kept for the next task. Raises TaskUnfit."""
        _check_shapes(module, weight_shapes(given))
        return weights_of(module) if module is self._builder.whole else taken_weights(module)

    def _train_local(self, module: nn.Module, given: Weights, job: TrainJob, plan: LocalModelPlan) -> TrainResult:
        if module is self._builder.whole:
            module = copy.deepcopy(uncompiled(module))
        exact = (
            LocalModel(copy.deepcopy(module), replace(plan, arithmetic=None), job.seed) if plan.emulated else None
        )
        local = LocalModel(module, plan, job.seed)
        start = self._as_sent(weights_of(local.module))
        nested = self._nested(local.module, plan.nested)
        with local.training():
            ran = self._run(job, local.module, local, nested)
            ran.check()
        metrics = {"loss": ran.mean_loss}
        local.settle()
        if len(self._data.held_out):
            local.module.eval()
            scores = _means(self._task, local.outputs, self._data.held_out)
            metrics |= {f"local_{name}": value for name, value in scores.items()}
        trained = self._as_sent(self._trained(local.module, given))
        clustered = tuple(local.clusters)
        masks = {name: mask.cpu().numpy() for name, mask in local.masks.items()}
        noise = 0.0 if exact is None else self._noise(exact, job, plan, ran.steps, (start, trained))
        return TrainResult(
            trained, len(self._data.train), ran.steps, metrics, start, masks, clustered, ran.tensor_bytes, noise
        )

    def _as_sent(self, weights: Weights) -> dict[str, np.ndarray]:
        """Convert the weights of a local model to the model's own dtypes."""
        dtypes = {spec.name: spec.numpy_dtype for spec in self._builder.layout}
        return {name: array.astype(dtypes[name], copy=False) for name, array in weights.items()}

    def _noise(
        self, exact: LocalModel, job: TrainJob, plan: LocalModelPlan, steps: int, update: tuple[Weights, Weights]
    ) -> float:
        """Take the same steps in float32 and compare. It costs little beside the emulation of a format."""
        before = weights_of(exact.module)
        same_steps = replace(job, max_steps=steps, time_left_s=None, report=_unreported)
        with _seeded(self._device, job.seed, job.round), exact.training():
            self._run(same_steps, exact.module, exact, self._nested(exact.module, plan.nested))
        trained = [name for name, _ in exact.module.named_parameters() if name in before]
        return noise_ratio(update, (before, weights_of(exact.module)), trained)

    def _nested(self, module: nn.Module, widths: Sequence[float]) -> Nested | None:
        """Return the narrower models to train along with `module`; None without any width."""
        if not widths:
            return None
        return Nested(module, self._sub_models.channels.map, self._sub_models.whole_shapes, widths)

    def _run(
        self,
        job: TrainJob,
        model: nn.Module,
        local: LocalModel | None = None,
        nested: Nested | None = None,
    ) -> TrainingRun:
        task, forward = self._task, model if local is None else local
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        levers = _levers(job)
        optimizer = _optimizer(task, parameters, job, local)
        scaling = None if local is None else local.loss_scale()
        step = TrainingStep(parameters, optimizer, job.proximal_mu, scaling)
        loss_of = self._loss(job)
        # BatchNorm cannot train on a single example, such as the last one of an epoch may be.
        skips_single = len(self._data.train) > 1 and _has_batch_norm(model)
        # Losses stay on the device, because reading one each step would make the CPU wait for an accelerator. They
        # are summed at the end, because a small number format could not hold the sum.
        losses: list[Tensor] = []
        examples: list[int] = []
        steps = 0
        memory = TensorBytes(model.parameters())
        for indices in job.batches(len(self._data.train), task.batch_size):
            steps += 1
            if len(indices) == 1 and skips_single:
                continue
            inputs, targets = self._data.train.batch(indices)
            step.clear()
            prepared = task.prepare(inputs, True)
            for part, share in micro_batches(len(indices), levers.micro_batches):
                own, wanted = (prepared, targets) if share == 1 else (prepared[part], targets[part])
                with memory.counting() if not losses else nullcontext(), _naming_batch(own, wanted):
                    loss = loss_of(forward(own), wanted)
                    total = _with_nested(loss, nested, partial(loss_of, targets=wanted), own)
                step.backward(total if share == 1 else total * share)
                losses.append(loss.detach())
                examples.append(len(wanted))
            step.take()
        first_loss = float(losses[0]) if losses else 0.0
        return TrainingRun(_mean_loss(losses, examples), steps, memory.total(optimizer), first_loss)

    def _loss(self, job: TrainJob) -> Callable[..., Tensor]:
        """Return the loss to train with, adjusted by labels where the job asks (`LabelAdjustment`)."""
        if not job.label_adjustment:
            return self._task.loss
        adjusted = LabelAdjustment(self._data.labels(), job.label_adjustment)
        return lambda outputs, targets: self._task.loss(adjusted(outputs), targets)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Return means of `loss` and the task's metrics over the held-out examples."""
        with self._lock, _seeded(self._device, 0):
            self._data.refresh()
            if not len(self._data.held_out):
                return None
            module = self._sub_models.loaded(self._builder.names.to_own(weights)).eval()
            metrics = _means(self._task, module, self._data.held_out)
            return EvalResult(len(self._data.held_out), metrics)


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


def _check_shapes(module: nn.Module, given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise TaskUnfit if a forward pass has changed the state, as observers of quantization do."""
    tensors = named_tensors(module)
    if others := tensors.keys() ^ given.keys():
        raise TaskUnfit(
            f"the model has {min(others)!r} at first or once it ran, and not both; let model() give "
            "it its last shape, such as by a first pass"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != given[name]:
            raise TaskUnfit(
                f"the model's {name!r} is {list(given[name])} at first and {list(tensor.shape)} once it ran; let "
                "model() give it its last shape, such as by a first pass"
            )


def _unreported(done_steps: int, total_steps: int) -> None:
    """Report no progress: the steps were counted already."""


def _mean_loss(losses: list[Tensor], examples: list[int]) -> float:
    """Average the batches' mean losses over the examples; 0 without any batch."""
    values = np.array(torch.stack(losses).tolist()) if losses else np.zeros(0)
    return float(values @ np.array(examples, np.float64) / max(1, sum(examples)))


@torch.no_grad()
def _means(task: LearningTask, model: Forward, held_out: Batches) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    count = max(1, min(_EVALUATION_BATCH, _EVALUATION_BATCHES * task.batch_size))
    for start in range(0, len(held_out), count):
        indices = np.arange(start, min(start + count, len(held_out)))
        inputs, targets = held_out.batch(indices)
        prepared = task.prepare(inputs, False)
        with _naming_batch(prepared, targets):
            outputs = model(prepared)
            means = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
        for name, mean in means.items():
            sums[name] = sums.get(name, torch.zeros((), device=outputs.device)) + mean * len(indices)
    return {name: float(total) / len(held_out) for name, total in sums.items()}


def _model_of(task: LearningTask) -> nn.Module:
    model: Any = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"{type(task).__name__}.model() must return a torch.nn.Module, not a {type(model).__name__}"
        )
    return model


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


def _with_nested(
    loss: Tensor, nested: Nested | None, loss_of: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    """Add the losses of the narrower models to the model's own."""
    if not nested:
        return loss
    return torch.stack([loss, *nested.losses(loss_of, inputs.to(loss.dtype))]).sum()


@contextmanager
def _seeded(device: torch.device, *seed: int) -> Iterator[None]:
    """Seed torch's random numbers within the block, and restore their state after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        yield


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


def _check_finite(weights: Weights, given: Weights) -> None:
    """Raise TaskError if training has made a value infinite or NaN.

    Values that were not finite before and are unchanged pass, such as attention masks or statistics without data.
    """
    for name, array in weights.items():
        if array.dtype.kind in "iub" or np.isfinite(array.astype(np.float32, copy=False)).all():
            continue
        if not np.array_equal(array, given[name], equal_nan=True):
            raise TaskError(f"training diverged: {name!r} is not finite; lower the learning rate")

"""`Trainer` for a `TorchTask`: the model of each call is built for its weights, trained and dropped.

The rule: on a CPU, equal weights, data and job give equal results, whatever ran before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgrpc.algorithms.algorithm import Term
from fedgrpc.codec.layout import Layout, TensorRole
from fedgrpc.errors import TaskError, TaskUnfit, UsageError
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.layer_cost import LayerCost
from fedgrpc.submodels.plan import LocalModelPlan, matches
from fedgrpc.torch.batches import Values, moved, overrides
from fedgrpc.torch.building import ModuleBuilder
from fedgrpc.torch.data import LocalData, choose_device
from fedgrpc.torch.early_exits import loss_of_exits
from fedgrpc.torch.layer_costs import layer_costs
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.nested import Nested
from fedgrpc.torch.local_model.noise import noise_ratio
from fedgrpc.torch.local_model.slicing import SubModels
from fedgrpc.torch.memory import KnownBytes
from fedgrpc.torch.training import LearningTask, run_training, scores_of
from fedgrpc.torch.weights import taken_weights, tensor_roles, uncompiled, weights_of
from fedgrpc.trainer import EvalResult, LocalExamples, TaskSetup, TrainJob, TrainResult, Weights, weight_shapes

# BatchNorm cannot train on one example.
_FEW = 2
# Models draw from torch's generator of the process, which trainers of one process share.
_GENERATOR = threading.RLock()


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
        # Bytes of trainings without a local model, by their momentum.
        self._known_bytes: dict[float | None, KnownBytes] = {}

    def for_part(self, partition: str, part: str) -> TorchTrainer:
        """See `fedgrpc.trainer.for_part`: model and data are those of this trainer."""
        other = copy.copy(self)
        other._data = self._data.for_part(partition, part)
        return other

    def _build(self) -> nn.Module:
        with _seeded_alone(self._device, self._seed):
            return _trained_alone(_model_of(self._task), self._task)

    def initial_weights(self) -> Weights:
        """Build the whole model, and return its untrained weights, equal on all workers with the same seed."""
        with self._lock:
            return taken_weights(self._builder.initial())

    def layout(self) -> Layout:
        """Return the layout of the whole model, which need not be built for it."""
        return self._builder.layout

    def roles(self) -> Mapping[str, TensorRole]:
        """Return the roles of the model's buffers and frozen parameters."""
        return tensor_roles(self._builder.module)

    def tied_names(self) -> Mapping[str, tuple[str, ...]]:
        """Return the further names of tied weights."""
        return self._builder.names.tied

    def local_examples(self) -> LocalExamples:
        """Return the examples that there are to train on now, read again if they have changed."""
        with self._lock:
            return self._data.examples()

    def channels(self) -> ChannelMap:
        """Find channel groups, blocks and costs of the model by examples. Raises UsageError."""
        with self._lock, _seeded_alone(self._device, 0):
            return replace(self._sub_models.channels.map, costs=self._layer_costs)

    def small_device_remarks(self) -> list[str]:
        """Return what of the task's settings costs a small device more than it gains."""
        found = []
        if self._task.autocast:
            found.append(
                f"autocast to {self._task.autocast} needs fast 16-bit arithmetic, which a Raspberry Pi lacks"
            )
        if processes := self._data.loader_processes:
            found.append(f"a DataLoader has num_workers={processes}: each is a process with libraries of its own")
        return found

    def full_width_tensors(self) -> list[tuple[list[str], str]]:
        """Return the tensors that no width makes narrower, grouped by reason, without the model's output."""
        with self._lock, _seeded_alone(self._device, 0):
            return self._sub_models.channels.by_reason

    def activation_bytes(self) -> int:
        """Return the bytes that the whole model's backward pass keeps for a batch; 0 is unknown."""
        with self._lock, _seeded_alone(self._device, 0):
            return round(sum(cost.kept_bytes + cost.input_bytes for cost in self._layer_costs))

    @cached_property
    def _layer_costs(self) -> tuple[LayerCost, ...]:
        """Costs of the whole model for a batch, counted with two examples; empty where they are not known.

        Zeros in place of weights take less memory than training does.
        """
        if self._builder.whole is not None or len(self._data.train) < _FEW:
            return ()
        inputs, targets = self._data.train.first(_FEW)
        cpu = torch.device("cpu")
        prepared, wanted = moved(self._task.prepare(inputs, True), cpu), moved(targets, cpu)
        module = self._builder.blank().train()
        batch = min(self._task.batch_size, len(self._data.train))
        if overrides(self._task, "training_step"):
            return layer_costs(module, lambda: self._task.training_step(module, prepared, wanted), batch / _FEW)
        loss = loss_of_exits(module, self._task.loss)
        return layer_costs(module, lambda: loss(self._task.forward(module, prepared), wanted), batch / _FEW)

    def _example(self) -> Tensor:
        """Return two examples' inputs. Raises UsageError for inputs of several tensors."""
        examples = self._data.train if len(self._data.train) else self._data.held_out
        inputs, _ = examples.first(_FEW)
        prepared: Values = self._task.prepare(inputs, False)
        if not isinstance(prepared, Tensor):
            raise UsageError("the model's inputs are several tensors, which are not traced")
        return prepared

    def to_export(self, weights: Weights) -> tuple[nn.Module, Tensor]:
        """Return the whole model with these weights, ready to score, and an example of its input, on the CPU."""
        with self._lock, _seeded(self._device, 0):
            module = self._sub_models.loaded(self._builder.names.to_own(weights))
            return copy.deepcopy(uncompiled(module)).cpu().eval(), self._example().cpu()

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Train on mini-batches, with the term of the run's algorithm in the gradients.

        Weights of a sub-model train a narrower model. With `local_model`, the local model of that plan is trained.
        """
        with self._lock, _seeded(self._device, job.seed, job.round):
            self._data.refresh()
            self._data.check_trainable()
            job = replace(job, term=partial(self._own_term, job.term))
            own = self._builder.names.to_own(weights)
            module = self._sub_models.loaded(own)
            if job.local_model is not None:
                result = self._train_local(module, own, job, job.local_model)
            else:
                # An optimizer of the task's own may keep another state in each round.
                own_optimizer = overrides(self._task, "optimizer_for")
                known = None if own_optimizer else self._known_bytes.setdefault(job.momentum, {})
                ran = run_training(self._task, self._data, job, module, known=known)
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

    def _own_term(self, asked: Callable[[], Term]) -> Term:
        """Return an algorithm's term with the module's own names."""
        term, to_own = asked(), self._builder.names.to_own
        anchor = None if term.anchor is None else to_own(term.anchor)
        return replace(term, offset=to_own(term.offset), anchor=anchor)

    def _trained(self, module: nn.Module, given: Weights) -> dict[str, np.ndarray]:
        """Return the module's weights: copies if it is kept for the next task. Raises TaskUnfit."""
        trained = weights_of(module) if module is self._builder.whole else taken_weights(module)
        _check_shapes(trained, weight_shapes(given))
        return trained

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
            ran = run_training(self._task, self._data, job, local.module, local, nested)
            ran.check()
        metrics = {"loss": ran.mean_loss}
        local.settle()
        if len(self._data.held_out):
            local.module.eval()
            scores = scores_of(self._task, local.module, local.outputs, self._data.held_out)
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
            nested = self._nested(exact.module, plan.nested)
            run_training(self._task, self._data, same_steps, exact.module, exact, nested)
        trained = [name for name, _ in exact.module.named_parameters() if name in before]
        return noise_ratio(update, (before, weights_of(exact.module)), trained)

    def _nested(self, module: nn.Module, widths: Sequence[float]) -> Nested | None:
        """Return the narrower models to train along with `module`; None without any width."""
        if not widths:
            return None
        return Nested(module, self._sub_models.channels.map, self._sub_models.whole_shapes, widths)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Return means of `loss` and the task's metrics over the held-out examples."""
        with self._lock, _seeded(self._device, 0):
            self._data.refresh()
            if not len(self._data.held_out):
                return None
            module = self._sub_models.loaded(self._builder.names.to_own(weights)).eval()
            metrics = scores_of(self._task, module, module, self._data.held_out)
            return EvalResult(len(self._data.held_out), metrics)


def _check_shapes(tensors: Weights, given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise TaskUnfit if a forward pass has changed the state, as observers of quantization do."""
    if others := tensors.keys() ^ given.keys():
        raise TaskUnfit(
            f"the model has {min(others)!r} at first or once it ran, and not both; let model() give "
            "it its last shape, such as by a first pass"
        )
    for name, tensor in tensors.items():
        if tensor.shape != given[name]:
            raise TaskUnfit(
                f"the model's {name!r} is {list(given[name])} at first and {list(tensor.shape)} once it ran; let "
                "model() give it its last shape, such as by a first pass"
            )


def _unreported(done_steps: int, total_steps: int) -> None:
    """Report no progress: the steps were counted already."""


def _trained_alone(model: nn.Module, task: LearningTask) -> nn.Module:
    """Freeze what `trainable()` does not name. Raises UsageError where it names nothing of the model."""
    patterns = task.trainable()
    if patterns is None:
        return model
    chosen = tuple([patterns] if isinstance(patterns, str) else patterns)
    names = [name for name, _ in uncompiled(model).named_parameters()]
    for pattern in chosen:
        if not any(matches(name, (pattern,)) for name in names):
            raise UsageError(
                f"{type(task).__name__}.trainable() names {pattern!r}, and the model has no such tensor"
            )
    for name, parameter in uncompiled(model).named_parameters():
        parameter.requires_grad_(matches(name, chosen))
    return model


def _model_of(task: LearningTask) -> nn.Module:
    model: Any = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"{type(task).__name__}.model() must return a torch.nn.Module, not a {type(model).__name__}"
        )
    return model


@contextmanager
def _seeded(device: torch.device, *seed: int) -> Iterator[None]:
    """Seed torch's random numbers within the block, and restore their state after it."""
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    if device.type != "cpu":
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(number)
            yield
        return
    # `torch.manual_seed` also notes a stack trace for each accelerator that is not there: milliseconds.
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(number)
    try:
        yield
    finally:
        generator.set_state(before)


@contextmanager
def _seeded_alone(device: torch.device, *seed: int) -> Iterator[None]:
    """Seed as `_seeded`, while no other trainer builds a model: else each would draw from the other's seed."""
    with _GENERATOR, _seeded(device, *seed):
        yield


def _check_finite(weights: Weights, given: Weights) -> None:
    """Raise TaskError if training has made a value infinite or NaN.

    Values that were not finite before and are unchanged pass, such as attention masks or statistics without data.
    """
    for name, array in weights.items():
        if array.dtype.kind in "iub" or np.isfinite(array.astype(np.float32, copy=False)).all():
            continue
        if not np.array_equal(array, given[name], equal_nan=True):
            raise TaskError(f"training diverged: {name!r} is not finite; lower the learning rate")

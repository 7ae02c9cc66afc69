"""Modules built without values: only a sub-model gets memory, and its outputs are those of a cut whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedgrpc.codec.layout import Layout, TensorRole, layout_of
from fedgrpc.errors import TaskError, UsageError
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_size import elements_of
from fedgrpc.torch.building import unwritten_zeros
from fedgrpc.torch.local_model.slicing import resized, shapes_of
from fedgrpc.torch.models.pointnet import PointNet
from fedgrpc.torch.models.registry import MODEL_NAMES, build_model
from fedgrpc.torch.models.small import sigmoid_mlp
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, Weights
from tests.torch.plain import Plain, trainer_of


class ReadOnce(Mapping[str, np.ndarray]):
    """Weights that are read on access, and count how often."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.layout: Layout = layout_of(arrays)
        self.reads: dict[str, int] = dict.fromkeys(arrays, 0)

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return self._arrays[name].copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def task_of(build: Any, shape: tuple[int, ...]) -> TorchTrainer:
    class Task(TorchTask):
        def model(self) -> nn.Module:
            module: nn.Module = build()
            return module

        def data(self, path: Path | None) -> tuple[Any, Any]:
            inputs = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
            return TensorDataset(inputs, torch.arange(4) % 2), None

    return Task.build_trainer(TaskSetup(device="cpu"))


def ready(name: str) -> Any:
    gray = name in ("mlp", "lenet", "cnn", "sigmoid-mlp")
    channels, side = (1, 28) if gray else (3, 32)
    return lambda: build_model(name, num_classes=5, in_channels=channels, image_size=side), (channels, side, side)


class Grouped(nn.Module):
    """A grouped convolution, which keeps its width, a depthwise one, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.z_in = nn.Linear(12, 6)
        self.a_out = nn.Linear(12, 6)
        self.a_out.weight = self.z_in.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.wide(self.norm(self.grouped(self.first(x))))).mean((2, 3))
        outputs: Tensor = self.head(torch.relu(self.z_in(x) + self.a_out(x)))
        return outputs


MODELS: dict[str, Any] = {
    **{name: ready(name) for name in MODEL_NAMES},
    "pointnet": (PointNet, (3, 16)),
    "sigmoid mlp": (sigmoid_mlp, (5,)),
    "grouped and tied": (Grouped, (3, 8, 8)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def cut(trainer: TorchTrainer, sub_model: SubModel, whole: Weights) -> Weights:
    selection = trainer.channels().select(sub_model, whole)
    return {name: selection.coverage(name, array.shape).take(array).copy() for name, array in whole.items()}


@pytest.mark.parametrize("name", MODELS)
def test_layout_and_sub_models_built_directly_are_those_of_the_whole_model(name: str) -> None:
    build, shape = MODELS[name]
    trainer = task_of(build, shape)
    assert trainer._builder.is_empty(trainer._builder.module)
    whole = trainer.initial_weights()
    layout = trainer.layout()
    assert [(spec.name, spec.shape, spec.numpy_dtype) for spec in layout] == [
        (name, array.shape, array.dtype) for name, array in whole.items()
    ]
    assert {spec.name: spec.role for spec in layout if spec.role is not TensorRole.PARAMETER} == trainer.roles()
    assert {spec.name: spec.tied_names for spec in layout if spec.tied_names} == trainer.tied_names()
    weights = ReadOnce(cut(trainer, SubModel(0.5, "random", 3), whole))
    direct = trainer._sub_models.loaded(weights).eval()
    assert set(weights.reads.values()) == {1}
    module = build()
    reference = resized(module, {**shapes_of(module), **{n: array.shape for n, array in weights.items()}}).eval()
    values = {n: torch.from_numpy(array) for n, array in weights.items()}
    own = trainer._builder.names.own
    reference.load_state_dict({n: values[own[n]] for n in reference.state_dict()})
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(direct(example), reference(example))
    assert trainer._builder.is_empty(trainer._builder.module)


def test_no_tensor_of_the_whole_model_gets_memory_for_a_sub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = task_of(*MODELS["cnn"])
    narrow = cut(trainer, SubModel(0.25), trainer.initial_weights())
    largest = max(array.nbytes for array in narrow.values())
    trainer = task_of(*MODELS["cnn"])
    made: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        made.append(0 if tensor.is_meta else tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(trainer._builder, "initial", lambda: pytest.fail("the whole model is built"))
    trainer.channels()
    trainer.train(narrow, TrainJob(max_steps=1))
    trainer.evaluate(narrow)
    assert max(made) == largest


def test_tied_weights_stay_tied_and_train_as_one() -> None:
    trainer = task_of(*MODELS["grouped and tied"])
    whole = trainer.initial_weights()
    assert "z_in.weight" not in whole
    for weights in (whole, cut(trainer, SubModel(0.5), whole)):
        module: Any = trainer._sub_models.loaded(weights)
        assert module.a_out.weight is module.z_in.weight
        trained = trainer.train(weights, TrainJob(max_steps=2)).weights
        assert trained.keys() == weights.keys()
        assert not np.array_equal(trained["a_out.weight"], weights["a_out.weight"])


class ByValue(nn.Module):
    """Its constructor computes with values, as of a drop rate for each layer."""

    def __init__(self) -> None:
        super().__init__()
        rates = [float(rate) for rate in torch.linspace(0, 0.5, 2)]
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(rates[1]), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layers(x)
        return outputs


class Hidden(nn.Module):
    """A buffer that no run brings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.layer(x) * self.scale)
        return outputs


class Closure(nn.Module):
    """A function among its attributes that refers to a layer, which a copy of the module would not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        layer = self.layer
        self.twice = lambda x: 2 * layer(x)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.twice(x))
        return outputs


class Transposed(nn.Module):
    """An autoencoder's two layers on one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.decode.weight = nn.Parameter(self.encode.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.decode(self.encode(x)))
        return outputs


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (ByValue, "constructor needs values"),
        (Hidden, "'scale' is no part of its state"),
        (Closure, "function 'twice' refers to"),
        (Transposed, "'encode.weight' and 'decode.weight' share memory"),
    ],
)
def test_a_module_that_needs_values_is_built_whole_with_one_line_that_says_why(
    module: type[nn.Module], why: str
) -> None:
    class Task(Plain):
        def model(self) -> nn.Module:
            return module()

    with capture_logs() as logs:
        trainer = trainer_of(Task)
    lines = [line for line in logs if "whole model is built" in line["event"]]
    assert len(lines) == 1
    assert why in lines[0]["reason"]
    weights = trainer.initial_weights()
    first = trainer.train(weights, TrainJob(max_steps=3)).weights
    again = trainer.train(weights, TrainJob(max_steps=3)).weights
    assert all(np.array_equal(first[name], again[name]) for name in weights)
    assert any(not np.array_equal(first[name], weights[name]) for name in weights)
    assert all(np.array_equal(array, weights[name]) for name, array in trainer.initial_weights().items())


def test_a_module_whose_constructor_runs_a_first_pass_is_built_without_values() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3)
            self.head = nn.Linear(self.conv(torch.zeros(1, 1, 8, 8)).flatten(1).shape[1], 2)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.head(torch.relu(self.conv(x)).flatten(1))
            return outputs

    trainer = task_of(Sized, (1, 8, 8))
    assert trainer._builder.whole is None
    assert trainer.layout()[2].shape == (2, 6 * 36)


def test_a_model_without_values_is_told_when_its_first_weights_are_asked_for() -> None:
    class Task(Plain):
        def model(self) -> nn.Module:
            return nn.Linear(4, 2, device="meta")

    with pytest.raises(UsageError, match="meta device and has no values"):
        trainer_of(Task).initial_weights()


def test_a_constructor_that_is_wrong_in_itself_raises_its_own_error() -> None:
    class Task(Plain):
        def model(self) -> nn.Module:
            raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        trainer_of(Task)
    with pytest.raises(TaskError, match=r"must return a torch\.nn\.Module"):
        trainer_of(type("Bent", (Plain,), {"model": lambda self: None}))


def test_channels_of_a_forward_pass_that_needs_values_are_found_with_values() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not self.layer.weight.any():
                raise ValueError("not initialized")
            outputs: Tensor = self.last(self.layer(x))
            return outputs

    class Task(Plain):
        def model(self) -> nn.Module:
            return Checks()

    trainer = trainer_of(Task)
    with capture_logs() as logs:
        assert "any()" in trainer.full_width_tensors()[0][1]
    assert any("to find its channels" in line["event"] for line in logs)


def test_zeros_take_no_memory_until_they_are_written() -> None:
    before = psutil.Process().memory_info().rss
    zeros = unwritten_zeros((64, 1 << 20), torch.float32)
    assert not bool(zeros.any())
    assert psutil.Process().memory_info().rss - before < 32 << 20
    zeros[3] = 1.0
    assert zeros.sum() == 1 << 20
    assert unwritten_zeros((2, 0), torch.int64).shape == (2, 0)


@pytest.mark.parametrize("name", ["cnn", "resnet18-batch", "grouped and tied"])
def test_activations_are_those_of_a_real_step(name: str) -> None:
    trainer = task_of(*MODELS[name])
    given = trainer.initial_weights()
    result = trainer.train(given, TrainJob(max_steps=1, batch_size=4))
    trained = sum(given[spec.name].nbytes for spec in trainer.layout() if spec.role is TensorRole.PARAMETER)
    assert trainer.activation_bytes() == pytest.approx(result.tensor_bytes - 3 * trained, rel=0.05)


@pytest.mark.parametrize("name", ["cnn", "mobilenetv2", "resnet18-exits"])
@pytest.mark.parametrize(
    "plan",
    [
        LocalModelPlan(0.5),
        LocalModelPlan(0.25),
        LocalModelPlan(depth=2),
        LocalModelPlan(trained_layers=("fc*", "classifier*", "exits.3*")),
        LocalModelPlan(trained_layers=("fc1*", "features.1[4-8]*", "blocks.3*")),
        LocalModelPlan(trained_layers=("*.bias",)),
    ],
    ids=LocalModelPlan.to_line,
)
def test_activations_of_a_part_are_priced_by_its_layers(name: str, plan: LocalModelPlan) -> None:
    trainer = task_of(*MODELS[name])
    weights, channels = trainer.initial_weights(), trainer.channels()
    kept = channels.select(plan.sub_model(0))
    given = {
        name: kept.coverage(name, each.shape).take(each).copy() for name, each in weights.items() if kept.has(name)
    }
    job = TrainJob(max_steps=1, batch_size=4, local_model=plan)
    parameters = {spec.name for spec in trainer.layout() if spec.role is TensorRole.PARAMETER}
    measured = trainer.train(given, job).tensor_bytes - sum(
        given[name].nbytes * (3 if plan.is_trained(name) else 1) for name in given if name in parameters
    )
    shapes = {name: array.shape for name, array in weights.items()}
    step = elements_of(plan, shapes, channels).size(8.0, 8.0).step_shares
    whole = trainer.activation_bytes()
    assert whole * step.kept == pytest.approx(measured, rel=0.2, abs=0.06 * whole)

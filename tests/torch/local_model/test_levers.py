"""Levers save memory, and train as without them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedgrpc.errors import UsageError
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, Memory
from fedgrpc.torch.local_model.levers import blocks_of, micro_batches
from fedgrpc.torch.models import build_model
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, TrainResult


class Images(TorchTask):
    """Noise, to be trained on by any model; one batch of ten."""

    batch_size = 10

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make

    def model(self) -> nn.Module:
        return self._make()

    def data(self, path: Path | None) -> tuple[TensorDataset, None]:
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(torch.randn(10, 3, 16, 16, generator=generator), torch.arange(10) % 3), None


class Blocks(nn.Module):
    """A stem, three blocks with normalization and dropout, and a head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        block = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True)) for _ in range(3)]
        self.blocks = nn.Sequential(*block)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.blocks(self.stem(x)).mean(dim=(2, 3))))  # type: ignore[no-any-return]


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def group_norm_and_dropout(channels: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, channels), nn.Dropout(0.3))


def trained(make: Callable[[], nn.Module], plan: LocalModelPlan | None, momentum: float = 0.9) -> TrainResult:
    torch.set_num_threads(1)
    trainer = _trainer(make)
    return trainer.train(
        trainer.initial_weights(), TrainJob(epochs=3, seed=1, local_model=plan, momentum=momentum)
    )


def _trainer(make: Callable[[], nn.Module]) -> TorchTrainer:
    return TorchTrainer(Images(make), TaskSetup(device="cpu"))


def distance(one: TrainResult, other: TrainResult) -> float:
    assert one.weights.keys() == other.weights.keys()
    return max(float(np.abs(one.weights[name] - other.weights[name]).max()) for name in one.weights)


@pytest.mark.parametrize("norm", [group_norm, group_norm_and_dropout, nn.BatchNorm2d])
def test_checkpoints_train_bit_for_bit_the_same_with_fewer_bytes(norm: Callable[[int], nn.Module]) -> None:
    whole = trained(lambda: Blocks(norm), None)
    saving = trained(lambda: Blocks(norm), LocalModelPlan(memory=Memory(checkpoint=True)))
    assert distance(whole, saving) == 0
    assert saving.metrics == whole.metrics
    assert saving.tensor_bytes < 0.7 * whole.tensor_bytes


def test_a_checkpoint_does_not_import_the_compiler() -> None:
    before = "torch._dynamo" in sys.modules
    trained(lambda: Blocks(group_norm), LocalModelPlan(memory=Memory(checkpoint=True)))
    assert before or "torch._dynamo" not in sys.modules


def test_a_model_without_blocks_has_no_checkpoints_and_says_so() -> None:
    with pytest.raises(UsageError, match="has no"):
        trained(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), LocalModelPlan(memory=Memory(checkpoint=True))
        )


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 8), ("mobilenetv2", 19), ("shufflenetv2", 16), ("lenet", 0)]
)
def test_ready_models_have_these_blocks(name: str, count: int) -> None:
    assert len(blocks_of(build_model(name, num_classes=10, in_channels=3, image_size=32))) == count


@pytest.mark.parametrize("parts", [2, 3, 10, 64])
def test_micro_batches_add_up_to_the_batch(parts: int) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 3))

    whole = trained(make, None)
    saving = trained(make, LocalModelPlan(memory=Memory(micro_batches=parts)))
    assert 0 < distance(whole, saving) < 1e-6
    assert saving.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-6)
    assert saving.steps == whole.steps
    assert saving.tensor_bytes < whole.tensor_bytes


def test_parts_of_a_batch_are_as_equal_as_can_be() -> None:
    found = list(micro_batches(10, 4))
    assert [part.stop - part.start for part, _ in found] == [2, 3, 2, 3]
    assert sum(share for _, share in found) == pytest.approx(1)
    assert [part for part, _ in micro_batches(2, 5)] == [slice(0, 1), slice(1, 2)]


def test_without_momentum_there_are_no_velocities() -> None:
    saving = trained(lambda: Blocks(group_norm), LocalModelPlan(memory=Memory(momentum=False)), momentum=0.9)
    plain = trained(lambda: Blocks(group_norm), None, momentum=0.0)
    usual = trained(lambda: Blocks(group_norm), None, momentum=0.9)
    assert distance(saving, plain) == 0
    weights = sum(array.nbytes for array in usual.weights.values())
    assert usual.tensor_bytes - saving.tensor_bytes == weights


def test_layers_that_are_not_trained_stay_as_they_are_and_take_no_gradients() -> None:
    plan = LocalModelPlan(trained_layers=("blocks.2.*", "fc.*"))
    result = trained(lambda: Blocks(nn.BatchNorm2d), plan)
    usual = trained(lambda: Blocks(nn.BatchNorm2d), None)
    assert result.start is not None
    for name, array in result.weights.items():
        moved = not np.array_equal(array, result.start[name])
        # A convolution's bias before BatchNorm has no gradient but rounding.
        assert moved is plan.is_trained(name) or name.endswith("0.bias"), name
    assert result.tensor_bytes < 0.7 * usual.tensor_bytes


def test_a_plan_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no parameter head"):
        trained(lambda: Blocks(group_norm), LocalModelPlan(trained_layers=("head.*",)))


def test_levers_leave_the_trainers_own_model_as_it_was() -> None:
    trainer = _trainer(lambda: Blocks(nn.BatchNorm2d))
    given = trainer.initial_weights()
    before = trainer.train(given, TrainJob(seed=1))
    memory = Memory(2, checkpoint=True, momentum=False)
    plan = LocalModelPlan(trained_layers=("fc.*",), memory=memory, arithmetic=Arithmetic("bfloat16"))
    trainer.train(given, TrainJob(seed=1, local_model=plan))
    after = trainer.train(given, TrainJob(seed=1))
    assert distance(before, after) == 0


def test_biases_alone_are_trained_in_images_with_channels_last() -> None:
    """torch 2.13 ends the process with signal 11 where a GroupNorm's input needs no gradient."""

    def make() -> nn.Module:
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 14 * 14, 3)
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    plan = LocalModelPlan(trained_layers=("*.bias",))
    result = trained(make, plan)
    assert result.start is not None
    moved = {name for name, array in result.weights.items() if not np.array_equal(array, result.start[name])}
    assert moved
    assert all(plan.is_trained(name) for name in moved)

"""A device of depth k has k blocks and exits of the model, trains them, and holds no tensor of the others."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, Memory, Quantization
from fedgrpc.torch.early_exits import EarlyExits, block_numbers, loss_of_exits
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, Weights

LAST = 48


class Rows(TorchTask):
    """Three blocks for two clouds of points; the last block has a width that no other tensor has."""

    learning_rate = 0.1
    batch_size = 20

    def model(self) -> nn.Module:
        widths = [4, 8, 8, LAST]
        blocks = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(widths)]
        return EarlyExits(blocks, [nn.Linear(width, 2) for width in widths[1:]])

    def data(self, path: Path | None) -> tuple[TensorDataset, TensorDataset]:
        labels = torch.arange(120) % 2
        points = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)) + 2 * labels[:, None]
        return TensorDataset(points[:100], labels[:100]), TensorDataset(points[100:], labels[100:])


@pytest.fixture
def trainer() -> TorchTrainer:
    torch.set_num_threads(1)
    return Rows.build_trainer(TaskSetup(device="cpu"))


def cut(trainer: TorchTrainer, sub_model: SubModel, whole: Weights) -> Weights:
    kept = trainer.channels().select(sub_model, whole)
    return {
        name: kept.coverage(name, array.shape).take(array).copy()
        for name, array in whole.items()
        if kept.has(name)
    }


def test_blocks_are_numbered_and_exits_belong_to_theirs(trainer: TorchTrainer) -> None:
    channels = trainer.channels()
    assert channels.depth == 3
    assert {name for name, number in channels.blocks.items() if number == 2} == {
        *("blocks.1.0.weight", "blocks.1.0.bias", "exits.1.weight", "exits.1.bias")
    }
    assert not block_numbers(nn.Linear(2, 2))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_a_device_of_less_depth_never_holds_a_tensor_of_a_later_block(
    trainer: TorchTrainer, depth: int, width: float
) -> None:
    given = cut(trainer, SubModel(width, depth=depth), trainer.initial_weights())
    assert not any(name.startswith(("blocks.2", "exits.2")) for name in given)
    gc.collect()
    seen: list[int] = []

    def sizes() -> list[int]:
        # Parameters of the whole model without values, on the meta device, take no memory.
        found = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and not each.is_meta)
        return [each.numel() for each in found if LAST in each.shape]

    job = TrainJob(epochs=1, report=lambda done, total: seen.extend(sizes()))
    result = trainer.train(given, job)
    trainer.evaluate(given)
    assert not seen
    assert not sizes()
    assert result.weights.keys() == given.keys()
    assert any((result.weights[name] != given[name]).any() for name in given if name.startswith("exits"))
    trainer.train(trainer.initial_weights(), job)
    assert seen


def test_every_exit_learns_and_the_score_is_of_their_mean(trainer: TorchTrainer) -> None:
    weights = cut(trainer, SubModel(depth=2), trainer.initial_weights())
    before = trainer.evaluate(weights)
    after = trainer.evaluate(trainer.train(weights, TrainJob(epochs=4)).weights)
    assert before is not None
    assert after is not None
    assert after.metrics["loss"] < before.metrics["loss"]
    module = Rows().model().eval()
    inputs = torch.randn(3, 4)
    module.train()
    outputs = module(inputs)
    assert outputs.shape == (3, 3, 2)
    torch.testing.assert_close(module.eval()(inputs), outputs.mean(0))


def test_the_loss_is_that_of_the_paper() -> None:
    outputs, targets = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 4
    loss = loss_of_exits(Rows().model(), functional.cross_entropy, 0.5)(outputs, targets)
    expected = 0.0
    for i in range(3):
        expected += float(functional.cross_entropy(outputs[i], targets))
        for j in range(3):
            if i != j:
                own, other = outputs[i].softmax(1), outputs[j].softmax(1)
                expected += 0.5 * float((other * (other / own).log()).sum(1).mean()) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_an_exit_learns_from_the_others_and_does_not_teach_them(trainer: TorchTrainer) -> None:
    outputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    constant = torch.zeros(5, dtype=torch.long)
    loss_of_exits(Rows().model(), lambda outputs, targets: outputs.sum() * 0, 1.0)(outputs, constant).backward()
    assert outputs.grad is not None
    own, other = outputs.detach().softmax(2)
    torch.testing.assert_close(outputs.grad[0], (own - other) / 5)
    weights = trainer.initial_weights()
    plain = trainer.train({**weights}, TrainJob()).weights
    pulled = trainer.train({**weights}, TrainJob(local_model=LocalModelPlan(distillation=1.0))).weights
    assert any((plain[name] != pulled[name]).any() for name in plain)


@pytest.mark.parametrize(
    "plan",
    [
        LocalModelPlan(nested=(0.5,)),
        LocalModelPlan(quantization=Quantization(8, 8)),
        LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
        LocalModelPlan(arithmetic=Arithmetic("float16", emulated=True)),
        LocalModelPlan(memory=Memory(4)),
        LocalModelPlan(trained_layers=("exits.*",), distillation=0.1),
    ],
    ids=lambda plan: plan.to_line(),
)
def test_depth_goes_with_every_other_technique(trainer: TorchTrainer, plan: LocalModelPlan) -> None:
    weights = cut(trainer, SubModel(depth=2), trainer.initial_weights())
    result = trainer.train(weights, TrainJob(epochs=2, local_model=plan))
    assert result.weights.keys() == weights.keys()
    assert all(np.isfinite(array).all() for array in result.weights.values())


def test_other_blocks_than_the_first_are_refused(trainer: TorchTrainer) -> None:
    weights = {name: array for name, array in trainer.initial_weights().items() if not name.startswith("blocks.0")}
    with pytest.raises(LayoutError, match=r"blocks\.0"):
        trainer.train(weights, TrainJob())


def test_blocks_that_share_a_tensor_are_refused() -> None:
    shared = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="share no tensor"):
        block_numbers(EarlyExits([shared, shared], [nn.Linear(4, 2), nn.Linear(4, 2)]))
    with pytest.raises(UsageError, match="2 blocks and 1 exits"):
        EarlyExits([shared, shared], [nn.Linear(4, 2)])

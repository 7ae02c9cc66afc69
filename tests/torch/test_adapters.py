"""Adapters of low rank: what is frozen stays, and a device of rank r has the first r directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedgrpc.codec.layout import TensorRole
from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import SubModel
from fedgrpc.torch.adapters import Adapter, with_adapters
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


class Adapted(TorchTask):
    """Two clouds of points; adapters of rank 4 in the first two layers, and the last layer is trained."""

    learning_rate = 0.2
    batch_size = 20

    def model(self) -> nn.Module:
        return with_adapters(network(), 4, ("0", "2"), trained=("4.*",))

    def data(self, path: Path | None) -> tuple[TensorDataset, TensorDataset]:
        labels = torch.arange(120) % 2
        points = torch.randn(120, 6, generator=torch.Generator().manual_seed(0)) + labels[:, None]
        return TensorDataset(points[:100], labels[:100]), TensorDataset(points[100:], labels[100:])


@pytest.fixture
def trainer() -> TorchTrainer:
    torch.set_num_threads(1)
    return Adapted.build_trainer(TaskSetup(device="cpu"))


def test_an_adapter_is_its_layer_and_a_product() -> None:
    layer = nn.Linear(5, 3)
    adapter = Adapter(layer, 2, scale=0.5)
    x = torch.randn(7, 5)
    torch.testing.assert_close(adapter(x), layer(x))
    with torch.no_grad():
        adapter.up.normal_()
    expected = x @ (layer.weight + 0.5 * adapter.up @ adapter.down).T + layer.bias
    torch.testing.assert_close(adapter(x), expected)


def test_what_is_frozen_is_constant_and_training_leaves_it(trainer: TorchTrainer) -> None:
    constant = {name for name, role in trainer.roles().items() if role is TensorRole.CONSTANT}
    assert constant == {"0.base.weight", "0.base.bias", "2.base.weight", "2.base.bias"}
    assert {spec.name for spec in trainer.layout() if spec.role is TensorRole.CONSTANT} == constant
    weights = trainer.initial_weights()
    trained = trainer.train(weights, TrainJob(epochs=2)).weights
    assert {name for name in weights if np.array_equal(trained[name], weights[name])} == constant


def test_a_device_of_rank_r_trains_the_first_r_directions(trainer: TorchTrainer) -> None:
    channels = trainer.channels()
    assert channels.rank == 4
    whole = trainer.initial_weights()
    kept = channels.select(SubModel(rank=1))
    given = {name: kept.coverage(name, array.shape).take(array).copy() for name, array in whole.items()}
    assert given["2.down"].shape == (1, 16)
    assert given["2.up"].shape == (16, 1)
    np.testing.assert_array_equal(given["2.down"][0], whole["2.down"][0])
    assert given["0.base.weight"].shape == (16, 6)
    before, result = trainer.evaluate(given), trainer.train(given, TrainJob(epochs=5))
    after = trainer.evaluate(result.weights)
    assert before is not None
    assert after is not None
    assert after.metrics["loss"] < before.metrics["loss"]


def test_width_and_rank_cut_different_channels(trainer: TorchTrainer) -> None:
    kept = trainer.channels().select(SubModel(0.5, rank=2))
    shapes = {spec.name: kept.coverage(spec.name, spec.shape).sub_shape for spec in trainer.layout()}
    assert shapes["2.down"] == (2, 8)
    assert shapes["2.base.weight"] == (8, 8)
    # A rank beyond the model's is all of it.
    wide = trainer.channels().select(SubModel(rank=99))
    assert wide.coverage("2.down", (4, 16)).whole


def test_layers_to_adapt_must_be_there() -> None:
    with pytest.raises(UsageError, match=r"no nn\.Linear named head"):
        with_adapters(network(), 4, ("head",))
    with pytest.raises(UsageError, match="rank from 1"):
        with_adapters(network(), 0)

"""Small tasks for tests of the trainer: four features, two classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, Weights

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(90, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()


class Plain(TorchTask):
    learning_rate = 0.1
    batch_size = 10

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return TensorDataset(X[:70], Y[:70]), TensorDataset(X[70:], Y[70:])


class Items(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class ByItem(Plain):
    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return Items(70), None


class Normalized(Plain):
    """71 examples in batches of 10 leave a batch of one, on which BatchNorm raises."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return TensorDataset(X[:71], Y[:71]), TensorDataset(X[71:], Y[71:])


class Linear(Plain):
    momentum = 0.0

    def model(self) -> nn.Module:
        return nn.Linear(4, 2)


def trainer_of(task: type[TorchTask], **setup: Any) -> TorchTrainer:
    return task.build_trainer(TaskSetup(**{"device": "cpu", **setup}))


def equal(first: Weights, second: Weights) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)

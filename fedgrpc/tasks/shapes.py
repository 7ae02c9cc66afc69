"""Classification of five solids by points on their surface, with PointNet. The data is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.datasets.dataset import Examples
from fedgrpc.datasets.shapes import SHAPES, load_shapes
from fedgrpc.errors import UsageError
from fedgrpc.torch.models.pointnet import PointNet
from fedgrpc.torch.task import TorchTask


class Shapes(TorchTask):
    """1600 clouds to train on, 400 held out. All devices have the same; `--partition` and `--part` split them.

    Options: `--option points=64`, `--option count=500`.
    """

    learning_rate = 0.005
    batch_size = 16

    def __init__(self, count: int = 2000, points: int = 128) -> None:
        if count < 10 * len(SHAPES) or points < 8:
            raise UsageError(f"shapes are at least {10 * len(SHAPES)} clouds of 8 points, not {count} of {points}")
        self._count, self._points = count, points

    def model(self) -> nn.Module:
        """Build PointNet with GroupNorm."""
        return PointNet(len(SHAPES))

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Generate the clouds. Raises UsageError for a path."""
        if path is not None:
            raise UsageError("the shapes are generated: they take no --data")
        data = load_shapes(self._count, self._points)
        return _tensors(data.train), _tensors(data.held_out)


def _tensors(examples: Examples) -> TensorDataset:
    return TensorDataset(torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels))

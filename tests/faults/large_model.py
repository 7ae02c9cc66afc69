"""A learning task whose whole model takes 135.6 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedgrpc.torch.task import TorchTask


class LargeModel(TorchTask):
    """Three layers, of which one has nearly all of the weights."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 8192), nn.ReLU(), nn.Linear(8192, 10))

    def data(self, path: Path | None) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, 64, generator=generator)
        labels = torch.randint(0, 10, (64,), generator=generator)
        return TensorDataset(inputs, labels), TensorDataset(inputs[:16], labels[:16])

"""A model and data of one's own in PyTorch: which of two spirals does a point lie on?

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task bring_your_own_torch
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedgrpc.torch.task import TorchTask


class Spirals(TorchTask):
    learning_rate = 0.05

    def model(self):
        return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    def data(self, path):
        # A device would read its own files from `path`; this one measures a few hundred points.
        radius, label = torch.rand(600), torch.randint(0, 2, (600,))
        angle = 6 * radius + torch.pi * label
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        points += 0.02 * torch.randn(600, 2)
        return TensorDataset(points[100:], label[100:]), TensorDataset(points[:100], label[:100])

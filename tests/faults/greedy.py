"""A learning task whose whole model its device cannot train: the process is killed, as for its memory."""

import os
import signal

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedgrpc.torch.task import TorchTask

HIDDEN = 32


class Greedy(TorchTask):
    """Kills its process in the first step of a model of more than half the width."""

    def model(self):
        return nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    def data(self, path):
        points = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(points, (points[:, 0] > 0).long()), None

    def optimizer(self, parameters, *rates):
        parameters = list(parameters)
        if max(len(each) for each in parameters) > HIDDEN / 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().optimizer(parameters, *rates)

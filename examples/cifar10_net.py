"""The small convolutional network of PyTorch's CIFAR-10 tutorial.

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task cifar10_net --data FOLDER --partition iid --part 1/10
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedgrpc.datasets.cifar10 import load_cifar10
from fedgrpc.torch.task import TorchTask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x))).flatten(1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


class Cifar(TorchTask):
    def model(self):
        return Net()

    def data(self, path):
        cifar = load_cifar10(path)
        return [
            TensorDataset(torch.tensor(part.inputs), torch.tensor(part.labels))
            for part in (cifar.train, cifar.held_out)
        ]

    def prepare(self, inputs, training):
        return inputs / 127.5 - 1

"""What every simulator trains: LeNet on Fashion-MNIST, clients of 60 images, one batch each. Needs torch alone.

A simulator writes a line to its output after each round: "round", and how many clients it has trained in it.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

DATA = Path("/usr/share/datasets/fashion-mnist")
CLIENTS, COHORT, EXAMPLES = 1000, 100, 60
BATCH, LEARNING_RATE, MOMENTUM = 64, 0.05, 0.9


class LeNet(nn.Module):
    """The LeNet of `fedgrpc.torch.models.small`: 44426 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 28, 28]."""
        x = torch.relu(functional.max_pool2d(self.conv1(x), 2))
        x = torch.relu(functional.max_pool2d(self.conv2(x), 2))
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


@cache
def training_data() -> tuple[Tensor, Tensor]:
    """Images as bytes [60000, 1, 28, 28], shuffled, and labels [60000]; read once in a process."""
    images = np.frombuffer(_read("train-images-idx3-ubyte.gz"), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(_read("train-labels-idx1-ubyte.gz"), np.uint8, offset=8).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy(images[order]), torch.from_numpy(labels[order])


def _read(name: str) -> bytes:
    with gzip.open(DATA / name) as file:
        return file.read()


def tell(clients: int) -> None:
    """Say that a round is over, in which so many clients have trained."""
    print(f"round {clients}", flush=True)

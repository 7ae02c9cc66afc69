"""A plain convolutional network, wide enough that a quarter of its channels is still a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CNN(nn.Module):
    """Two 5x5 convolutions of 32 and 64 filters with stride 2 and ReLU, then 128 and the classes.

    The network of McMahan et al. (arXiv 1602.05629) for MNIST, with strides for its pooling and 128 units for 512.
    454922 parameters for 28x28 greyscale. Nothing is normalized, so sub-models need no statistics.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        side = -(-image_size // 4)
        self.conv1 = nn.Conv2d(in_channels, 32, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, stride=2, padding=2)
        self.fc1 = nn.Linear(64 * side * side, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, image_size, image_size]."""
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]

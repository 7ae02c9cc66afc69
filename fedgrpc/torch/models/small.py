"""Small networks without normalization: fully connected ones, LeNet, and a plain convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    """Fully connected layers with an `activation` between them; a batch [B, ...] is flattened first."""

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden: Sequence[int] = (128,),
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        sizes = [input_size, *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self._activation(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


def sigmoid_mlp(input_size: int = 5, num_classes: int = 2) -> MLP:
    """Build five layers of ten sigmoid units: the model of Zhang (2021, arXiv 2105.14675), section 6."""
    return MLP(input_size, num_classes, (10,) * 5, torch.sigmoid)


class LeNet(nn.Module):
    """Two 5x5 convolutions of 6 and 16 filters with ReLU and 2x2 max pooling, then 120, 84 and the classes.

    LeCun et al. (1998), in the form NIID-Bench (arXiv 2102.02079) uses. 44426 parameters for 28x28 greyscale.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"LeNet needs images of at least 16x16 pixels, not {image_size}x{image_size}")
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, image_size, image_size]."""
        # ReLU and max pooling commute, and ReLU is cheaper on what is left.
        x = torch.relu(functional.max_pool2d(self.conv1(x), 2))
        x = torch.relu(functional.max_pool2d(self.conv2(x), 2))
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


class Net(LeNet):
    """The network of PyTorch's tutorial "Training a Classifier", for 32x32 colour images: 62006 parameters."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__(num_classes, in_channels, image_size)


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

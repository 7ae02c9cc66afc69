"""LeNet with 6 and 16 filters, and the small CIFAR network of the PyTorch tutorial, which has its shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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

"""Networks with early exits, for devices of different depth (`fedgrpc.torch.early_exits`)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from fedgrpc.torch.early_exits import EarlyExits
from fedgrpc.torch.models.norm import norm_layer
from fedgrpc.torch.models.resnet import ResNet18


def cnn_with_exits(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> EarlyExits:
    """Build three 3x3 convolutions of 32, 64 and 128 filters with stride 2, GroupNorm and ReLU, each with an exit.

    An exit is the mean over the image and a linear layer. 95 166 parameters for greyscale and ten classes.
    """
    if image_size < 8:
        raise ValueError(
            f"the network halves images three times, and {image_size}x{image_size} is too small for it"
        )
    sizes = [in_channels, 32, 64, 128]
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), norm_layer("group", o), nn.ReLU())
        for i, o in pairwise(sizes)
    ]
    return EarlyExits(blocks, [_exit(channels, num_classes) for channels in sizes[1:]])


def resnet18_with_exits(num_classes: int = 10, in_channels: int = 3, norm: str = "group") -> EarlyExits:
    """Build ResNet-18 with an exit after each of its four stages: DepthFL's, without bottlenecks in exits."""
    whole = ResNet18(num_classes, in_channels, norm=norm)
    stem = nn.Sequential(whole.conv1, whole.bn1, nn.ReLU(), whole.maxpool, whole.layer1)
    exits = [_exit(channels, num_classes) for channels in (64, 128, 256, 512)]
    return EarlyExits([stem, whole.layer2, whole.layer3, whole.layer4], exits)


def _exit(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

"""ResNet-18 with GroupNorm in place of BatchNorm, whose statistics differ between workers of unequal data.

He et al. (arXiv 1512.03385); GroupNorm in federated training: Hsieh et al. (arXiv 1910.00189); two groups, as
Reddi et al. (arXiv 2003.00295) have. `fedgrpc.torch.models.norm` has BatchNorm, too.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fedgrpc.torch.models.norm import norm_layer


class ResNet18(nn.Module):
    """Four stages of two basic blocks, 64 to 512 channels; layers carry torchvision's names.

    `cifar_stem` is a 3x3 convolution for images of 32x32 pixels or so; without it, the 7x7 convolution of
    stride 2 and the max pooling made for 224x224.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, cifar_stem: bool = True, norm: str = "group"
    ) -> None:
        super().__init__()
        stage = partial(_stage, norm)
        if cifar_stem:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm_layer(norm, 64)
        self.layer1 = stage(64, 64, stride=1)
        self.layer2 = stage(64, 128, stride=2)
        self.layer3 = stage(128, 256, stride=2)
        self.layer4 = stage(256, 512, stride=2)
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, norm: str, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm_layer(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H/stride, W/stride]."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + self.downsample(x))


def _stage(norm: str, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(norm, in_channels, channels, stride), BasicBlock(norm, channels, channels, 1))

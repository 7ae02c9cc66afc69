"""ShuffleNetV2 (Ma et al., arXiv 1807.11164), under torchvision's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedgrpc.torch.models.norm import norm_layer

_BLOCKS = (4, 8, 4)
# Channels of the three stages and of the last convolution, by width multiplier (table 5).
_WIDTHS = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024)}


class ShuffleNetV2(nn.Module):
    """Units that split the channels, work on one half, and shuffle.

    `cifar_stem` leaves out the first two halvings of the image, for images of 32x32 pixels or so. With
    `norm="batch"` and without it, the state_dict is torchvision's.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        cifar_stem: bool = True,
        norm: str = "group",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if width not in _WIDTHS:
            raise ValueError(f"ShuffleNetV2 has widths {', '.join(map(str, _WIDTHS))}, not {width:g}")
        stem = nn.Conv2d(in_channels, 24, 3, 1 if cifar_stem else 2, padding=1, bias=False)
        self.conv1 = nn.Sequential(stem, norm_layer(norm, 24), nn.ReLU(inplace=True))
        self.maxpool: nn.Module = nn.Identity() if cifar_stem else nn.MaxPool2d(3, 2, padding=1)
        *stages, last = _WIDTHS[width]
        self.stage2 = _stage(24, stages[0], _BLOCKS[0], norm)
        self.stage3 = _stage(stages[0], stages[1], _BLOCKS[1], norm)
        self.stage4 = _stage(stages[1], stages[2], _BLOCKS[2], norm)
        self.conv5 = nn.Sequential(*_pointwise(stages[2], last, norm))
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class ShuffleUnit(nn.Module):
    """One unit: of stride 1 it works on the second half of the channels, of stride 2 on all, twice."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self._stride = stride
        half = channels // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                *_depthwise(in_channels, stride, norm),
                *_pointwise(in_channels, half, norm),
            )
        self.branch2 = nn.Sequential(
            *_pointwise(in_channels if stride > 1 else half, half, norm),
            *_depthwise(half, stride, norm),
            *_pointwise(half, half, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H/stride, W/stride]."""
        if self._stride == 1:
            kept, worked = x.chunk(2, dim=1)
            return _shuffled(torch.cat((kept, self.branch2(worked)), dim=1))
        return _shuffled(torch.cat((self.branch1(x), self.branch2(x)), dim=1))


def _stage(in_channels: int, channels: int, blocks: int, norm: str) -> nn.Sequential:
    units = [ShuffleUnit(in_channels, channels, 2, norm)]
    units += [ShuffleUnit(channels, channels, 1, norm) for _ in range(blocks - 1)]
    return nn.Sequential(*units)


def _pointwise(in_channels: int, channels: int, norm: str) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, 1, bias=False)
    return [conv, norm_layer(norm, channels), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int, norm: str) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [conv, norm_layer(norm, channels)]


def _shuffled(x: Tensor) -> Tensor:
    """The channels of both halves by turns."""
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)

"""MobileNetV2 (Sandler et al., arXiv 1801.04381), under torchvision's names."""

from __future__ import annotations

from torch import Tensor, nn

from fedgrpc.torch.models.norm import norm_layer

# Expansion, channels, blocks, stride of the first block (table 2).
_STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


class MobileNetV2(nn.Module):
    """Inverted residual blocks with linear bottlenecks.

    `cifar_stem` leaves out the first two halvings of the image, for images of 32x32 pixels or so. With
    `norm="batch"` and without it, the state_dict is torchvision's.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, cifar_stem: bool = True, norm: str = "group"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(in_channels, 32, 3, 1 if cifar_stem else 2, norm)]
        channels = 32
        for expansion, width, blocks, stride in _STAGES:
            for place in range(blocks):
                step = stride if place == 0 and not (cifar_stem and width == 24) else 1
                layers.append(InvertedResidual(channels, width, step, expansion, norm))
                channels = width
        layers.append(_conv(channels, 1280, 1, 1, norm))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project; added to the input where the shape allows."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [_conv(in_channels, hidden, 1, 1, norm)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv(hidden, hidden, 3, stride, norm, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            norm_layer(norm, channels),
        )
        self._added = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H/stride, W/stride]."""
        out: Tensor = self.conv(x)
        return x + out if self._added else out


def _conv(in_channels: int, channels: int, size: int, stride: int, norm: str, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm_layer(norm, channels), nn.ReLU6(inplace=True))

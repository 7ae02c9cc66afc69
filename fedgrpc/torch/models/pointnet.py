"""PointNet for classifying point clouds (Qi et al., arXiv 1612.00593)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_GROUPS = 2


class PointNet(nn.Module):
    """Points are moved by a learned transform, each is described by itself, and the maxima describe the cloud.

    GroupNorm stands for the paper's BatchNorm, whose running statistics do not survive averaging; the second
    transform, of 64x64, is left out, as the paper finds it worth 0.7 points at most (table 5).
    """

    def __init__(self, num_classes: int = 5, dropout: float = 0.3) -> None:
        super().__init__()
        self.transform = Transform()
        self.points = nn.Sequential(
            *_pointwise(3, 64),
            *_pointwise(64, 64),
            *_pointwise(64, 64),
            *_pointwise(64, 128),
            *_pointwise(128, 1024),
        )
        self.cloud = nn.Sequential(
            *_dense(1024, 512), *_dense(512, 256), nn.Dropout(dropout), nn.Linear(256, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of clouds [B, 3, N]."""
        x = torch.bmm(self.transform(x), x)
        return self.cloud(self.points(x).amax(dim=2))  # type: ignore[no-any-return]


class Transform(nn.Module):
    """A 3x3 matrix for each cloud, near the identity at first."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(*_pointwise(3, 64), *_pointwise(64, 128), *_pointwise(128, 1024))
        self.cloud = nn.Sequential(*_dense(1024, 512), *_dense(512, 256), nn.Linear(256, 9))
        last = self.cloud[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 3] of clouds [B, 3, N]."""
        matrix = self.cloud(self.points(x).amax(dim=2)).view(-1, 3, 3)
        return matrix + torch.eye(3, dtype=x.dtype, device=x.device)  # type: ignore[no-any-return]


def _pointwise(in_channels: int, channels: int) -> list[nn.Module]:
    return [nn.Conv1d(in_channels, channels, 1), nn.GroupNorm(_GROUPS, channels), nn.ReLU(inplace=True)]


def _dense(in_features: int, features: int) -> list[nn.Module]:
    return [nn.Linear(in_features, features), nn.GroupNorm(_GROUPS, features), nn.ReLU(inplace=True)]

"""Normalization layers that stand in for each other, under the same names."""

from __future__ import annotations

from torch import nn

NORMS = ("group", "batch", "static")
_GROUPS = 2


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Build the normalization of `channels` channels.

    group     GroupNorm, which has no running statistics to average (arXiv 1910.00189)
    batch     BatchNorm, which the files of torchvision need
    static    BatchNorm by the current batch, also without statistics (HeteroFL, arXiv 2010.01264)

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "group":
        return nn.GroupNorm(_GROUPS, channels)
    if kind in NORMS:
        return nn.BatchNorm2d(channels, track_running_stats=kind == "batch")
    raise ValueError(f"no normalization {kind!r}; there are {', '.join(NORMS)}")

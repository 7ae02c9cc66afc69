"""CIFAR-10 from its published archives. `--model net`, or `--model resnet18`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedgrpc.tasks.images import ImageTask

_PADDING = 4


class Cifar10(ImageTask):
    """50000 images of 32x32 to train on, shifted and mirrored at random; 10000 held out."""

    dataset = "cifar10"
    image_size = 32
    in_channels = 3
    learning_rate = 0.01
    batch_size = 64

    def __init__(self, model: str = "net", augment: bool = True) -> None:
        super().__init__(model)
        self._augment = augment
        self._mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
        self._deviation = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        """Normalize each channel to mean 0 and deviation 1 over the training set."""
        pixels = super().prepare(inputs, training)
        pixels = (pixels - self._mean.to(pixels.device)) / self._deviation.to(pixels.device)
        return _shifted_and_mirrored(pixels) if training and self._augment else pixels


def _shifted_and_mirrored(images: Tensor) -> Tensor:
    """Cut each image [B, C, H, W] out of its padded self at random, and mirror half of them."""
    count, _, height, width = images.shape
    padded = functional.pad(images, [_PADDING] * 4)
    down, right = torch.randint(0, 2 * _PADDING + 1, (2, count, 1), device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=images.device)[:, None, None]
    # Indexing around the channels puts them last; back to [B, C, H, W].
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

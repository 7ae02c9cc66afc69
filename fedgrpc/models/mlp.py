"""A fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them; a batch of any shape [B, ...] is flattened first."""

    def __init__(self, input_size: int, num_classes: int, hidden: Sequence[int] = (128,)) -> None:
        super().__init__()
        sizes = [input_size, *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]

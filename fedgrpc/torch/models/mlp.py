"""A fully connected network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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
    """Five layers of ten sigmoid units: the model of Zhang (2021), section 4."""
    return MLP(input_size, num_classes, (10,) * 5, torch.sigmoid)

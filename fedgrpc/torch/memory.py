"""How many bytes of tensors a training step takes at its most, counted in one step of it.

The rule: each storage counts once. Unlike a process's resident memory this is the model's own share, which falls
when the model gets smaller, whatever else the process has ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A weight, its gradient, its velocity.
_STATE = 3


class TensorBytes:
    """Of weights, gradients, velocities, and of what autograd keeps for the backward pass."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self._own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self._state_bytes = _STATE * sum(tensor.numel() * tensor.element_size() for tensor in parameters)
        self._kept: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self._state_bytes + sum(self._kept.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a forward pass, whose backward pass may come later."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
        # Itself, an output would keep the graph that keeps it.
        return tensor.detach()

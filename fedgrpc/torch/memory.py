"""Peak bytes of tensors in a training step, counted during one step.

The rule: each storage counts once. Unlike a process's resident memory, the count is the model's own share. It
falls when the model gets smaller, whatever else the process has held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A weight, its gradient, its velocity.
_STATE = 3


class TensorBytes:
    """Bytes of weights, gradients and velocities, and of the tensors that autograd saves for the backward pass."""

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
        """Count what a forward pass in the block saves. Its backward pass may come later."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
        # Detached, because an output would keep alive the graph that keeps the output.
        return tensor.detach()

"""Peak bytes of tensors in a training step, counted during one step.

The rule: each storage counts once. Unlike a process's resident memory, the count is the model's own share. It
falls when the model gets smaller, whatever else the process has held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class TensorBytes:
    """Bytes of weights, gradients and optimizer state, and of the tensors that autograd saves for the backward.

    Weights that need no gradient count once.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self._own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self._state_bytes = sum(tensor.nbytes * (1 + tensor.requires_grad) for tensor in parameters)
        self._kept: dict[int, int] = {}

    def total(self, optimizer: object) -> int:
        """Return the bytes in all, with the state that the optimizer has after a step."""
        state = sum(tensor.nbytes for tensor in _tensors_in(optimizer))
        return self._state_bytes + state + sum(self._kept.values())

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


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's `state`, as `torch.optim` and the optimizers here have it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
    elif hasattr(value, "state"):
        yield from _tensors_in(value.state)

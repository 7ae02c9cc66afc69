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
        self._own = {_place(tensor) for tensor in parameters}
        self._state_bytes = sum(tensor.nbytes * (1 + tensor.requires_grad) for tensor in parameters)
        self._kept: dict[int, int] = {}

    @property
    def kept(self) -> int:
        """Bytes that the forward pass has saved."""
        return sum(self._kept.values())

    def total(self, optimizer: object) -> int:
        """Return the bytes in all, with the state that the optimizer has after a step."""
        state = sum(tensor.nbytes for tensor in _tensors_in(optimizer))
        return self._state_bytes + state + self.kept

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what a forward pass in the block saves. Its backward pass may come later."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in self._own:
            self._kept[place] = tensor.untyped_storage().nbytes()
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


def _place(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    # Every address on the meta device is 0.
    return int(storage._cdata if tensor.is_meta else storage.data_ptr())

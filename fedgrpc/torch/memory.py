"""Peak bytes of tensors in a training step, counted during one step.

The rule: each storage counts once. Unlike a process's resident memory, the count is the model's own share. It
falls when the model gets smaller, whatever else the process has held. Tensors of the same shapes are counted once:
to look at each tensor that is saved takes longer than to train a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

_MOST_KNOWN: Final = 256
# Bytes by the shapes of parameters and batch.
KnownBytes = dict[object, int]


class TensorBytes:
    """Bytes of weights, gradients and optimizer state, and of the tensors that autograd saves for the backward.

    Weights that need no gradient count once.
    """

    def __init__(self, parameters: Iterable[Tensor], known: KnownBytes | None = None) -> None:
        """`known`: the bytes of former steps, where no more than shapes tells one from another."""
        self._parameters = list(parameters)
        self._own: set[int] = set()
        self._kept: dict[int, int] = {}
        self._known = {} if known is None else known
        self._shapes: object = None

    @property
    def kept(self) -> int:
        """Bytes that the forward pass has saved."""
        return sum(self._kept.values())

    def total(self, optimizer: object) -> int:
        """Return the bytes in all, with the state that the optimizer has after a step."""
        if (found := self._known.get(self._shapes)) is not None:
            return found
        own = sum(tensor.nbytes * (1 + tensor.requires_grad) for tensor in self._parameters)
        total = own + sum(tensor.nbytes for tensor in _tensors_in(optimizer)) + self.kept
        if self._shapes is not None and len(self._known) < _MOST_KNOWN:
            self._known[self._shapes] = total
        return total

    def counting(self, batch: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Count what the forward pass of a batch saves in the block. Its backward pass may come later."""
        self._shapes = tuple((tensor.shape, tensor.dtype) for tensor in (*self._parameters, *batch))
        if self._shapes in self._known:
            return nullcontext()
        self._own = {_place(tensor) for tensor in self._parameters}
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

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

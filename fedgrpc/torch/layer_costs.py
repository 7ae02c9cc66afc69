"""Costs of each layer of a model in a training step, counted in one forward pass.

The rule: costs belong to the layer's weight. Activations that autograd keeps belong to the layer that ran last,
and those before the first layer to the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedgrpc.submodels.layer_cost import LayerCost
from fedgrpc.torch.weights import shared_memory

_PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "addmm", "bmm"}


def layer_costs(module: nn.Module, run: Callable[[], Tensor], scale: float = 1.0) -> tuple[LayerCost, ...]:
    """Count a forward pass of `module` in training, which `run` does, in the order in which layers run.

    `scale`: of how many times as many examples the costs are.
    """
    counted = _Counted(module)
    with torch.autograd.graph.saved_tensors_hooks(counted.keep, lambda tensor: tensor), counted:
        run()
    return tuple(
        LayerCost(name, scale * counted.work[name], scale * kept, scale * counted.shared[name])
        for name, kept in counted.kept.items()
    )


class _Counted(TorchFunctionMode):
    """Mode that notes which layer's weight each function uses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(each): min(names) for names, tensors in shared_memory(module) for each in tensors}
        self._places = {each.untyped_storage().data_ptr() for each in module.parameters()}
        self._last = ""
        self._seen: set[int] = set()
        self.work: dict[str, float] = {}
        self.kept: dict[str, int] = {}
        self.shared: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weights = [each for each in tree_leaves((args, dict(kwargs))) if id(each) in self._names]
        # The bias first: what the function keeps belongs to its weight.
        for each in reversed(weights):
            self._enter(self._names[id(each)])
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        for each in weights:
            if name in _PRODUCTS and each.dim() > 1 and isinstance(out, Tensor):
                # One multiply-add for each element of the output and each that its row of the weight has.
                self.work[self._names[id(each)]] += out.numel() * math.prod(each.shape[1:])
        return out

    def _enter(self, name: str) -> None:
        self.work.setdefault(name, 0.0)
        self.kept.setdefault(name, self.kept.pop("", 0))
        self.shared.setdefault(name, 0)
        self._last = name

    def keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._places:
            counted = self.shared if place in self._seen else self.kept
            counted[self._last] = counted.get(self._last, 0) + tensor.untyped_storage().nbytes()
            self._seen.add(place)
        return tensor.detach()

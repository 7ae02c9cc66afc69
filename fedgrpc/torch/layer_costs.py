"""Costs of each layer of a model in a training step, counted in one forward pass.

The rule: costs belong to the layer's weight. Activations that autograd keeps belong to the layer that ran last.
Those before the first layer are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
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
        LayerCost(
            name, *(scale * each[name] for each in (counted.work, counted.kept, counted.inputs, counted.shared))
        )
        for name in counted.work
    )


class _Counted(TorchFunctionMode):
    """Mode that notes which layer's weight each function uses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(each): min(names) for names, tensors in shared_memory(module) for each in tensors}
        self._places = {each.untyped_storage().data_ptr() for each in module.parameters()}
        self._last = ""
        self._in_product = False
        self._seen: set[int] = set()
        # By layer, in the order in which they run.
        self.work: defaultdict[str, float] = defaultdict(float)
        self.kept: defaultdict[str, float] = defaultdict(float)
        self.inputs: defaultdict[str, float] = defaultdict(float)
        self.shared: defaultdict[str, float] = defaultdict(float)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weights = [each for each in tree_leaves((args, dict(kwargs))) if id(each) in self._names]
        # The bias first: what the function keeps belongs to its weight.
        for each in reversed(weights):
            self._last = self._names[id(each)]
            self.work[self._last] += 0.0
        self._in_product = getattr(func, "__name__", "").strip("_") in _PRODUCTS
        out = func(*args, **kwargs)
        if self._in_product and isinstance(out, Tensor):
            for each in weights:
                # One multiply-add for each element of the output and each that its row of the weight has.
                macs = out.numel() * math.prod(each.shape[1:]) if each.dim() > 1 else 0
                self.work[self._names[id(each)]] += macs
        self._in_product = False
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place in self._places:
            return tensor.detach()
        counted = self.shared if place in self._seen else self.inputs if self._in_product else self.kept
        counted[self._last] += tensor.untyped_storage().nbytes()
        self._seen.add(place)
        return tensor.detach()

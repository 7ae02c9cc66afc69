"""Emulation of a number format that the machine does not have, with an unchanged `nn.Module`.

The rule: within `Emulation` the result of every tensor operation, forward, backward and of the optimizer, is
rounded to the format before another operation reads it. So weights, activations, gradients and optimizer state
never hold more than the format can. An operation is what torch dispatches as one. A matrix product or convolution
sums in the carrier and is rounded once, like a multiplier with a wide accumulator, or with `accumulate` "format"
is rounded at every product and partial sum (`products`). Fused SGD is split into its
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fedgrpc.torch.local_model.formats import NEAREST, NumberFormat
from fedgrpc.torch.local_model.products import PRODUCTS

aten = torch.ops.aten
# Operations whose output holds only values of their inputs, which are rounded already. Rounding again would cost
# time, and with stochastic rounding random numbers.
_MOVES = {
    aten.clone.default,
    aten.copy_.default,
    aten.detach.default,
    aten.cat.default,
    aten.index_select.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.relu.default,
    aten.threshold_backward.default,
    aten.zero_.default,
}
# Operations whose second output is a count of the batch's examples for the backward pass. The count may be larger
# than a small format can hold, and rounding it would change the mean loss.
_COUNTING = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}


class Emulation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which tensor arithmetic is that of `number_format`.

    Modules and inputs must have the carrier's dtype, `number_format.carrier`. A float tensor that cannot hold the
    format raises `TypeError`. Scalars, such as a learning rate, are not rounded. Neither are tensors made before
    the context: `round_module` and `round` do that.
    """

    def __init__(
        self,
        number_format: NumberFormat,
        rounding: str = NEAREST,
        saturate: bool = False,
        seed: int = 0,
        accumulate: str = "carrier",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number_format = number_format
        self._rounding = rounding
        self._saturate = saturate
        self._accumulates = accumulate == "format"
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # The fused kernel would round once per step instead of after each of its operations.
        if func is aten._fused_sgd_.default:
            _sgd_in_steps(self.round, *args, **kwargs)
            return None
        if self._accumulates and func in PRODUCTS:
            return PRODUCTS[func](self.round, *args, **kwargs)
        out = func(*args, **kwargs)
        if func in _MOVES or func.is_view:
            return out
        if func in _COUNTING and isinstance(out, tuple):
            loss, count = out
            return self.round(loss), count
        # In-place operations must be rounded in place, because others hold a reference to the tensor.
        written = _written(func, args, kwargs)
        for tensor in written:
            tensor.copy_(self.round(tensor))
        return out if written else tree_map(self.round, out)

    def round(self, value: Any) -> Any:
        """Round a float tensor to the format; return anything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return self.number_format.round(value, self._rounding, self._saturate, self._generator)


def round_module(module: nn.Module, number_format: NumberFormat) -> None:
    """Move `module` to the format's carrier and round its parameters and buffers, in place."""
    module.to(number_format.carrier)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(number_format.round(tensor.detach()))


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """List the float tensors that an in-place, out= or foreach operation changes."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            leaves, _ = tree_flatten(value)
            found += [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found


def _sgd_in_steps(
    rounded: Callable[[Any], Any],
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor],
    velocities: Iterable[Tensor],
    *,
    weight_decay: float,
    momentum: float,
    lr: Any,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    **_: Any,
) -> None:
    """Do a step of `torch.optim.SGD`, rounding after each operation."""
    velocities = list(velocities)
    for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        step = -gradient if maximize else gradient
        if weight_decay:
            step = rounded(step + rounded(weight_decay * parameter))
        if momentum:
            velocity = velocities[place]
            if is_first_step:
                velocity.copy_(step)
            else:
                velocity.copy_(rounded(rounded(momentum * velocity) + rounded((1 - dampening) * step)))
            step = rounded(step + rounded(momentum * velocity)) if nesterov else velocity
        parameter.copy_(rounded(parameter - rounded(lr * step)))

"""Training in torch's own 16-bit types: weights, gradients and activations take half the memory of float32.

The rule: a matrix product or convolution sums in float32 and rounds its result once. Where the CPU has no such
instructions, as on a Raspberry Pi, torch's own 16-bit kernels are many times slower than those of float32.
`WideProducts` then computes one layer's product in float32 and keeps only the 16-bit result.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedgrpc.errors import UsageError
from fedgrpc.torch.local_model.formats import FloatFormat
from fedgrpc.torch.local_model.loss_scale import Rescalable
from fedgrpc.torch.optimizer import Optimizer

SHORT = (torch.float16, torch.bfloat16)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of a 16-bit type about as fast as those of float32.

    Of float16, oneDNN has no fast backward pass of convolutions: on a CPU with AVX512-FP16, it takes 200 times as
    long as that of float32.
    """
    if platform.machine() not in ("x86_64", "AMD64") or dtype is not torch.bfloat16:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class WideProducts(TorchFunctionMode):
    """Context in which convolutions and linear layers of 16-bit tensors on a CPU compute in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype in SHORT and first.device.type == "cpu":
            if func in _CONVOLUTIONS and (sizes := _sizes(args, kwargs)) is not None:
                weight = _argument(args, kwargs, 1, "weight", None)
                bias, groups = _argument(args, kwargs, 2, "bias", None), _argument(args, kwargs, 6, "groups", 1)
                return _WideConvolution.apply(first, weight, bias, sizes, groups)  # type: ignore[no-untyped-call]
            if func is nn.functional.linear:
                bias = _argument(args, kwargs, 2, "bias", None)
                return _WideLinear.apply(first, args[1], bias)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[list[int]] | None:
    """Return stride, padding and dilation of a convolution; None for a padding that differs between two sides."""
    kernel = _argument(args, kwargs, 1, "weight", None).shape[2:]
    stride, dilation = (
        _for_each(_argument(args, kwargs, *each, 1), len(kernel)) for each in ((3, "stride"), (5, "dilation"))
    )
    padding = _argument(args, kwargs, 4, "padding", 0)
    if padding == "same":
        both = [step * (extent - 1) for step, extent in zip(dilation, kernel, strict=True)]
        return None if any(each % 2 for each in both) else [stride, [each // 2 for each in both], dilation]
    return [stride, _for_each(0 if padding == "valid" else padding, len(kernel)), dilation]


def _for_each(value: int | Sequence[int], axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value)


class _WideConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[list[int]], groups: int
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.sizes, ctx.groups = sizes, groups
        zeros = [0] * len(sizes[0])
        wide = None if bias is None else bias.float()
        operation = torch.ops.aten.convolution
        out: Tensor = operation(inputs.float(), weight.float(), wide, *sizes, False, zeros, groups)
        return out.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.sizes
        found = torch.ops.aten.convolution_backward(
            gradients[0].float(),
            inputs.float(),
            weight.float(),
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            ctx.groups,
            list(ctx.needs_input_grad[:3]),
        )
        return *(None if each is None else each.to(inputs.dtype) for each in found), None, None


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        wide = None if bias is None else bias.float()
        return nn.functional.linear(inputs.float(), weight.float(), wide).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        gradient, dtype = gradients[0].float(), inputs.dtype
        rows = gradient.reshape(-1, gradient.shape[-1])
        by_input, by_weight, by_bias = ctx.needs_input_grad
        return (
            (gradient @ weight.float()).to(dtype) if by_input else None,
            (rows.t() @ inputs.float().reshape(-1, inputs.shape[-1])).to(dtype) if by_weight else None,
            rows.sum(0).to(dtype) if by_bias else None,
        )


class ShortWeights:
    """Optimizer of 16-bit `parameters` whose steps are computed in float32, one tensor after the other.

    `optimizer` makes the optimizer of one tensor. Its state, such as a velocity, is in float32. With `copy`, so is
    a copy of the weights, and no step is lost. Without, each step is rounded to `number_format` stochastically,
    so that none is lost in the mean.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        number_format: FloatFormat,
        copy: bool,
        seed: int,
    ) -> None:
        self._format = number_format
        self._copy = copy
        self._generator = torch.Generator().manual_seed(seed)
        self._tensors: list[tuple[nn.Parameter, nn.Parameter, Optimizer]] = []
        for parameter in parameters:
            wide = nn.Parameter(parameter.detach().float() if copy else torch.empty(0))
            self._tensors.append((parameter, wide, optimizer([wide])))

    @property
    def state(self) -> Sequence[object]:
        """The optimizers of the tensors and, with a copy, the copies: what is kept between steps."""
        copies = [wide for _, wide, _ in self._tensors] if self._copy else []
        return [*copies, *(optimizer for _, _, optimizer in self._tensors)]

    def rescale(self, factor: float) -> None:
        """See `Rescalable`. Raises `UsageError` for tensors' optimizers that cannot be rescaled."""
        for _, _, optimizer in self._tensors:
            if not isinstance(optimizer, Rescalable):
                raise UsageError(
                    f"a loss scale goes with SGD, as TorchTask has it, not with {type(optimizer).__name__}"
                )
            optimizer.rescale(factor)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step. A parameter without a gradient stays as it is."""
        for parameter, wide, optimizer in self._tensors:
            if parameter.grad is None:
                continue
            if not self._copy:
                wide.data = parameter.detach().float()
            wide.grad = parameter.grad.float()
            parameter.grad = None
            optimizer.step()
            wide.grad = None
            if self._copy:
                parameter.copy_(wide)
            else:
                parameter.copy_(self._format.round(wide.detach(), "stochastic", generator=self._generator))
                wide.data = torch.empty(0)

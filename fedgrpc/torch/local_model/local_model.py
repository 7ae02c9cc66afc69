"""A device's local model C_i(w): the global weights w, or a sub-model of them, made smaller as the plan says.

The rule: what C_i changes of w is no part of the update, which is a difference to C_i(w). So the error of C_i is
never averaged into the global model, and the update says nothing about coordinates that the device did not train.

    pruned          0 where the mask is False, there and in every step; the mask covers the rest
    clustered       all members of a cluster are equal, and step by the mean of their gradients
    quantized       forward with quantized weights and inputs, backward straight through; training starts at
                    the quantized weights, and continues from them in full precision
    small format    every operation's result rounded (emulated), or the whole module in torch's own type
    levers          the same training in less memory (`levers`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import _disable_current_modes

from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, matches
from fedgrpc.torch.batches import over_tensors
from fedgrpc.torch.local_model.clustering import Clusters, cluster
from fedgrpc.torch.local_model.emulate import Emulation, round_module
from fedgrpc.torch.local_model.formats import FLOAT32, FloatFormat, NumberFormat, parse_format
from fedgrpc.torch.local_model.levers import checkpointed, frozen
from fedgrpc.torch.local_model.loss_scale import LossScale
from fedgrpc.torch.local_model.native import SHORT, ShortWeights, WideProducts, has_fast_products
from fedgrpc.torch.local_model.products import check_small
from fedgrpc.torch.local_model.pruning import keep_masks, prunable
from fedgrpc.torch.local_model.quantization import quantized_activations, quantized_weights, straight_through
from fedgrpc.torch.optimizer import Optimizer


class LocalModel:
    """Local model of `plan`, made of `module` in place. The module already has the plan's width."""

    def __init__(self, module: nn.Module, plan: LocalModelPlan, seed: int = 0) -> None:
        self.module = module
        self._plan = plan
        self._seed = seed
        self._format = _format_of(plan.arithmetic)
        self.masks: dict[str, Tensor] = {}
        self.clusters: dict[str, Clusters] = {}
        self._parameters: dict[str, Tensor] = dict(module.named_parameters())
        self._quantized: dict[str, Tensor] = {}
        with torch.no_grad():
            self._apply_plan()

    def _apply_plan(self) -> None:
        plan = self._plan
        if plan.pruning is not None:
            self.masks = keep_masks(self._parameters, plan.pruning)
            for name, mask in self.masks.items():
                self._parameters[name].mul_(mask)
        if plan.clustering is not None:
            for name, tensor in prunable(self._parameters, plan.clustering.layers).items():
                kept = self.masks.get(name)
                self.clusters[name] = clusters = cluster(tensor, plan.clustering.clusters, kept)
                tensor.copy_(clusters.values if kept is None else clusters.values * kept)
        if plan.quantization is not None and plan.quantization.weight_bits:
            self._quantized = prunable(self._parameters, plan.quantization.layers)
            for name, tensor in self._quantized.items():
                tensor.copy_(self._on_grid(name, tensor))
        if plan.arithmetic is not None and plan.arithmetic.accumulate == "format":
            check_small(sum(parameter.numel() for parameter in self._parameters.values()))
        if self.emulated:
            round_module(self.module, self._format)
        elif self._format.native is not None:
            self.module.to(self._format.native)

    @property
    def emulated(self) -> bool:
        """True if arithmetic is rounded to the number format, instead of torch computing in it."""
        return self._plan.emulated

    @property
    def has_format(self) -> bool:
        """True if the plan names a number format."""
        return self._plan.arithmetic is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's float tensors and of its inputs."""
        native = self._format.native
        return self._format.carrier if self.emulated or native is None else native

    def loss_scale(self) -> LossScale | None:
        """Return a new loss scale if the plan has one. Raises `UsageError` if the format cannot hold it."""
        asked = self._plan.arithmetic
        if asked is None or (asked.loss_scale == 1 and not asked.dynamic_loss_scale):
            return None
        return LossScale(asked, self._format)

    def optimizer(
        self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Optimizer]
    ) -> Optimizer:
        """Return the optimizer that `make` makes, around which steps of 16-bit weights lose nothing if asked."""
        asked = self._plan.arithmetic
        if asked is None or self.emulated or not (asked.float32_copy or asked.rounding == "stochastic"):
            return make(parameters)
        assert isinstance(self._format, FloatFormat)
        return ShortWeights(parameters, make, self._format, asked.float32_copy, self._seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute outputs of the local model, as the device has it."""
        args, kwargs = over_tensors(self._given, args), over_tensors(self._given, kwargs)
        if not self._quantized:
            return self.module(*args, **kwargs)
        quantized = {
            name: straight_through(tensor, self._on_grid(name, tensor)) for name, tensor in self._quantized.items()
        }
        return functional_call(self.module, quantized, args, kwargs)

    def _given(self, tensor: Tensor) -> Tensor:
        """Return an input in the local model's number format."""
        if not tensor.is_floating_point():
            return tensor
        with _disable_current_modes():
            tensor = tensor.to(self.dtype)
            return self._format.round(tensor) if self.emulated else tensor

    def outputs(self, *args: Any, **kwargs: Any) -> Any:
        """Compute outputs in the local model's arithmetic, and return them in float32 to be scored."""
        with self.arithmetic():
            outputs = self(*args, **kwargs)
        return over_tensors(Tensor.float, outputs)

    def _on_grid(self, name: str, tensor: Tensor) -> Tensor:
        """Quantize a tensor. Clustered tensors have one scale, since a scale per channel would split clusters."""
        quantization = self._plan.quantization
        assert quantization is not None
        return quantized_weights(tensor, quantization.weight_bits, per_channel=name not in self.clusters)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Make model and optimizer compute in the local model's arithmetic within the block."""
        with ExitStack() as stack:
            if self.emulated:
                asked = self._plan.arithmetic
                assert asked is not None
                stack.enter_context(
                    Emulation(self._format, asked.rounding, seed=self._seed, accumulate=asked.accumulate)
                )
            elif self.dtype in SHORT and not has_fast_products(self.dtype):
                stack.enter_context(WideProducts())
            for handle in (*self._gradient_hooks(), *self._input_hooks()):
                stack.callback(handle.remove)
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Apply the plan's arithmetic and levers to training within the block. Raises `UsageError`."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.module, self._plan))
            if self._plan.memory is not None and self._plan.memory.checkpoint:
                stack.enter_context(checkpointed(self.module))
            stack.enter_context(self.arithmetic())
            yield

    def _gradient_hooks(self) -> Iterator[Any]:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and (name in self.masks or name in self.clusters):
                hook = partial(self._project, name)
                yield parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _project(self, name: str, parameter: Tensor) -> None:
        """Project a gradient onto the steps that the local model can take."""
        if parameter.grad is not None:
            # Outside of the emulation, because a small format could not count the members of a cluster.
            with _disable_current_modes():
                projected = self._projected(name, parameter.grad)
                parameter.grad = self._format.round(projected) if self.emulated else projected

    def _projected(self, name: str, values: Tensor) -> Tensor:
        mask = self.masks.get(name)
        if name in self.clusters:
            return self.clusters[name].projected(values, mask)
        return values if mask is None else values * mask

    def _input_hooks(self) -> Iterator[Any]:
        quantization = self._plan.quantization
        if quantization is None or not quantization.activation_bits:
            return
        for name, layer in self.module.named_modules():
            if isinstance(layer, nn.Linear | _ConvNd) and matches(f"{name}.weight", quantization.layers):
                yield layer.register_forward_pre_hook(partial(_quantize_input, quantization.activation_bits))

    def settle(self) -> None:
        """Make the members of a cluster equal again after training; they may differ in their last bit."""
        with torch.no_grad():
            for name, clusters in self.clusters.items():
                tensor = self._parameters[name]
                tensor.copy_(clusters.equalized(tensor, self.masks.get(name)))


def _quantize_input(bits: int, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *rest = inputs
    return straight_through(first, quantized_activations(first.detach(), bits)), *rest


def _format_of(arithmetic: Arithmetic | None) -> NumberFormat:
    return FLOAT32 if arithmetic is None else parse_format(arithmetic.format)

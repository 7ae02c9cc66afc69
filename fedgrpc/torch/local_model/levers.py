"""Levers of a local model that save memory and leave its arithmetic as it is.

    frozen         tensors that are not trained have no gradient, so none is kept for them
    checkpointed   a block keeps its input alone, and computes the rest again in the backward pass
    micro-batches  a batch goes through in parts, whose gradients are added up

The rule: without rounding, and where no layer looks at the whole batch as BatchNorm does, gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedgrpc.errors import UsageError
from fedgrpc.submodels.plan import LocalModelPlan

Forward = Callable[[Tensor], Tensor]


@contextmanager
def frozen(module: nn.Module, plan: LocalModelPlan) -> Iterator[None]:
    """Within the block, train only the tensors that the plan names.

    Raises:
        UsageError: the plan names no parameter of the module.
    """
    held = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not plan.is_trained(name)
    ]
    if held and not any(plan.is_trained(name) for name, _ in module.named_parameters()):
        raise UsageError(f"the model has no parameter {', '.join(plan.trained_layers)} to train")
    norms = [
        each
        for name, each in module.named_modules()
        if isinstance(each, _BatchNorm)
        and each.track_running_stats
        and not plan.is_trained(f"{name}.running_mean")
    ]
    groups = [each for each in module.modules() if isinstance(each, nn.GroupNorm)] if held else []
    with statistics_held(norms):
        hooks = [each.register_forward_pre_hook(_with_gradient) for each in groups]
        for parameter in held:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in held:
                parameter.requires_grad = True


def _with_gradient(norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a GroupNorm's input a gradient: without one, torch 2.13 crashes for images with channels last."""
    first, *rest = inputs
    if first.requires_grad or not any(each.requires_grad for each in norm.parameters()):
        return None
    return first.detach().requires_grad_(), *rest


@contextmanager
def statistics_held(norms: list[_BatchNorm]) -> Iterator[None]:
    """Within the block, running statistics do not change; `num_batches_tracked` is restored after it."""
    before = [(each, each.momentum, each.num_batches_tracked) for each in norms]
    for each, _, counted in before:
        each.momentum = 0.0
        each.num_batches_tracked = None if counted is None else counted.clone()
    try:
        yield
    finally:
        for each, momentum, counted in before:
            each.momentum, each.num_batches_tracked = momentum, counted


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the members of an `nn.Sequential` that have layers of their own.

    A block within a block is not listed.
    """
    if isinstance(module, nn.Sequential | nn.ModuleList):
        members = list(module)
        blocks = [each for each in members if any(True for _ in each.children())]
        if len(blocks) > 1 or (len(members) == 1 and blocks):
            return blocks
    return [block for child in module.children() for block in blocks_of(child)]


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Within the block, blocks of `module` keep only their inputs for the backward pass.

    Raises:
        UsageError: the module has no blocks.
    """
    blocks = blocks_of(module)
    if not blocks:
        raise UsageError(
            f"checkpoint saves nothing for {type(module).__name__}: it has no nn.Sequential whose members have "
            "layers of their own"
        )
    for block in blocks:
        block.forward = partial(_run_checkpointed, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _run_checkpointed(block: nn.Module, forward: Forward, inputs: Tensor) -> Tensor:
    # A block of an input without gradient, such as the first, takes part in the backward pass by the anchor.
    anchor = torch.empty(0, requires_grad=any(each.requires_grad for each in block.parameters()))
    outputs: Tensor = _Checkpoint.apply(block, forward, anchor, inputs)  # type: ignore[no-untyped-call]
    return outputs


class _Checkpoint(torch.autograd.Function):
    """Forward pass that keeps its input. Torch's own would import torch._dynamo: a second and 70 MB."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, forward: Forward, anchor: Tensor, inputs: Tensor) -> Tensor:
        ctx.block, ctx.forward = block, forward
        ctx.random = _random_states(inputs.device)
        ctx.save_for_backward(inputs)
        return forward(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        again = inputs.detach().requires_grad_(ctx.needs_input_grad[3])
        norms = [each for each in ctx.block.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
        devices = [inputs.device] if inputs.is_cuda else []
        # Dropout must drop the same again, and running statistics must not move a second time.
        with torch.random.fork_rng(devices), statistics_held(norms), torch.enable_grad():
            _restore_random(ctx.random, inputs.device)
            outputs = ctx.forward(again)
        torch.autograd.backward(outputs, gradients[0])
        return None, None, None, again.grad


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


def micro_batches(examples: int, parts: int) -> Iterator[tuple[slice, float]]:
    """Yield the parts of a batch of `examples`, as equal as can be, and the share of each."""
    count = min(parts, examples)
    for part in range(count):
        start, end = part * examples // count, (part + 1) * examples // count
        yield slice(start, end), (end - start) / examples

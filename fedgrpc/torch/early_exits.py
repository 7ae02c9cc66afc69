"""Models with early exits: a row of blocks, each with an exit that makes outputs of what the block gives.

    h_k = block_k(h_{k-1}),    z_k = exit_k(h_k),    h_0 the inputs

A device of depth k has the first k blocks and exits, and trains all of them (DepthFL: Kim et al., ICLR 2023):

    loss = sum_i loss(z_i, y)  +  distillation * sum_i mean_{j != i} KL(softmax(z_j) || softmax(z_i))

The outputs z_j that an exit learns from carry no gradient. The model's outputs are the mean of its exits'.

The rule: what a sub-model lacks is taken off the module before any tensor gets memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.errors import UsageError
from fedgrpc.torch.weights import shared_memory

Loss = Callable[[Tensor, Tensor], Tensor]


class EarlyExits(nn.Module):
    """Model of `blocks`, one after the other, and as many `exits`. A task's `model()` returns one, or a subclass.

    Its tensors are named blocks.0. ..., exits.0. ...; what a subclass adds is in every sub-model.
    """

    def __init__(self, blocks: Sequence[nn.Module], exits: Sequence[nn.Module]) -> None:
        super().__init__()
        if not blocks or len(blocks) != len(exits):
            raise UsageError(f"each block has an exit, and here are {len(blocks)} blocks and {len(exits)} exits")
        self.blocks = nn.ModuleList(blocks)
        self.exits = nn.ModuleList(exits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of each exit, [exits, B, ...], in training; else their mean, [B, ...]."""
        outputs: list[Tensor] = []
        for block, leave in zip(self.blocks, self.exits, strict=True):
            x = block(x)
            outputs.append(leave(x))
        if self.training:
            return torch.stack(outputs)
        # Added up, so that tracing sees that all of them are outputs.
        return sum(outputs[1:], outputs[0]) / len(outputs)


def block_numbers(module: nn.Module) -> dict[str, int]:
    """Return the number of each tensor's block, from 1, by name; empty for a model without early exits.

    Raises:
        UsageError: blocks share a tensor, so that none of them could be left out.
    """
    numbers: dict[str, int] = {}
    for names, _ in shared_memory(module) if isinstance(module, EarlyExits) else ():
        blocks = {_block_number(name) for name in names}
        if len(blocks) > 1:
            raise UsageError(f"blocks of a model with early exits share no tensor, as {' and '.join(names)} do")
        if number := blocks.pop():
            numbers[min(names)] = number
    return numbers


def _block_number(name: str) -> int:
    part, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) + 1 if part in ("blocks", "exits") else 0


def holding(module: nn.Module, names: Collection[str]) -> nn.Module:
    """Return the module with the blocks that have these tensors. It shares them with `module`."""
    numbers = block_numbers(module)
    depth = max((numbers.get(name, 0) for name in names), default=0)
    if not isinstance(module, EarlyExits) or not 0 < depth < len(module.blocks):
        return module
    cut = copy.copy(module)
    cut._modules = {**module._modules, "blocks": module.blocks[:depth], "exits": module.exits[:depth]}
    return cut


def names_held(module: nn.Module, names: Collection[str], given: Collection[str]) -> set[str]:
    """Return those of `names` that a sub-model as deep as the tensors `given` has."""
    numbers = block_numbers(module)
    depth = max((numbers.get(name, 0) for name in given), default=0)
    return {name for name in names if numbers.get(name, 0) <= depth}


def loss_of_exits(module: nn.Module, loss: Loss, distillation: float = 0.0) -> Loss:
    """Return the loss to train `module` with: for early exits that of the module docstring, else `loss` itself."""
    if not isinstance(module, EarlyExits):
        return loss

    def summed(outputs: Tensor, targets: Tensor) -> Tensor:
        total = torch.stack([loss(each, targets) for each in outputs]).sum()
        if not distillation or len(outputs) < 2:
            return total
        if targets.is_floating_point():
            raise UsageError("distillation between exits is for classes, and these targets are numbers")
        return total + distillation * _disagreement(outputs)

    return summed


def _disagreement(outputs: Tensor) -> Tensor:
    """Sum over exits the mean divergence from the other exits; `outputs` are logits [exits, B, classes]."""
    logs = [functional.log_softmax(each, 1) for each in outputs]
    pulls = [
        functional.kl_div(own, other.detach(), reduction="batchmean", log_target=True)
        for place, own in enumerate(logs)
        for other in (*logs[:place], *logs[place + 1 :])
    ]
    return torch.stack(pulls).sum() / (len(logs) - 1)

"""Tracing: finds the channel groups of any `nn.Module` by watching one forward pass.

The rule: channels keep their full width, with a reason, wherever an operation is not known to `operations`. So a
wrong sub-model is never built. At worst, a sub-model is wider than asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedgrpc.errors import UsageError
from fedgrpc.torch.adapters import with_ranks
from fedgrpc.torch.early_exits import block_numbers
from fedgrpc.torch.local_model.graph import OUTPUT, Channels, Graph
from fedgrpc.torch.local_model.operations import ALIASES, HANDLERS


def trace_channels(module: nn.Module, example: Tensor) -> Channels:
    """Find the channel groups and blocks of `module` by scoring `example`, a batch of one or a few inputs.

    Raises:
        UsageError: the module cannot score the example.
    """
    graph = Graph(module)
    with _evaluating(module), torch.no_grad():
        try:
            with _Watch(graph):
                outputs = module(example)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"the model cannot be traced: {error}") from error
    for output in tree_leaves(outputs):
        # The classes of the output have a meaning to the task, so they are not channels to choose from.
        if isinstance(output, Tensor):
            graph.freeze(graph.axes(output), OUTPUT)
    channels = graph.channels()
    marked = replace(with_ranks(channels.map, module), blocks=block_numbers(module))
    return replace(channels, map=marked)


@contextmanager
def _evaluating(module: nn.Module) -> Any:
    """Evaluate within the block, so that dropout does nothing and running statistics stay as they are."""
    training = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, was in training.items():
            each.training = was


class _Watch(TorchFunctionMode):
    """Mode that calls the handler of each torch function, by name. Inputs of other functions are frozen."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        # Functions of sizes and flags, such as Tensor.size, say nothing about channels.
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            return out
        handler = HANDLERS.get(ALIASES.get(name, name))
        if handler is None or not handler(self._graph, out, args, kwargs):
            reason = f"{name}() is not understood, or not with these sizes"
            for leaf in tree_leaves((args, dict(kwargs))):
                if isinstance(leaf, Tensor):
                    self._graph.freeze(self._graph.axes(leaf), reason)
                    # A weight of an unknown operation has no known axes yet, and must get none later.
                    if self._graph.is_state(leaf):
                        self._graph.freeze_state(leaf, reason)
        return out

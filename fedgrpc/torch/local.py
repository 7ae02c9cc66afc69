"""A task's model in the width of the weights it is given, and trained as a compression plan says.

The rule: a task says nothing about compression. Its `model()` is traced once, with an example of its own data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from fedgrpc.submodels.channels import SubModel, sub_shapes
from fedgrpc.submodels.plan import CompressionPlan
from fedgrpc.torch.local_model.graph import Channels
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.nested import Nested
from fedgrpc.torch.local_model.slicing import check_runs, check_slice, resized, shapes_of
from fedgrpc.torch.local_model.tracing import trace_channels
from fedgrpc.torch.weights import load_weights, named_tensors, uncompiled, weights_of
from fedgrpc.trainer import Weights

# A width at which every group that can be narrower is.
_TRIED = 0.5


class Widths:
    """Sub-models of one module; `example` gives a batch of its inputs, as it wants them."""

    def __init__(self, module: nn.Module, example: Callable[[], Tensor]) -> None:
        self._module = module
        self._example = example

    @cached_property
    def channels(self) -> Channels:
        """The module's channel groups. Raises UsageError when it cannot be traced, or does not run narrower."""
        example = self._example()
        channels = trace_channels(uncompiled(self._module), example)
        self._check(channels, example)
        return channels

    def _check(self, channels: Channels, example: Tensor) -> None:
        """A module's own code may count on its sizes, and only running it shows that."""
        whole = shapes_of(uncompiled(self._module))
        narrow = resized(uncompiled(self._module), sub_shapes(channels.map.select(SubModel(_TRIED)), whole))
        with torch.no_grad():
            training = self._module.training
            outputs = self._module.eval()(example)
            self._module.train(training)
        check_runs(narrow, example, tuple(outputs.shape))

    def nested(self, module: nn.Module, widths: Sequence[float]) -> Nested | None:
        """What is to be trained along with a loaded module; None where nothing is narrower."""
        whole = shapes_of(uncompiled(self._module))
        nested = Nested(module, self.channels.map, whole, widths) if widths else None
        return nested or None

    def loaded(self, weights: Weights) -> nn.Module:
        """The module itself with these weights or, where they are narrower, a narrower one.

        Raises:
            LayoutError: the weights are of no sub-model of the module.
        """
        own = {name: tuple(tensor.shape) for name, tensor in named_tensors(self._module).items()}
        given = {name: array.shape for name, array in weights.items()}
        module = self._module
        if given.keys() == own.keys() and given != own:
            module = uncompiled(module)
            check_slice(self.channels.map, shapes_of(module), given)
            module = resized(module, given)
        load_weights(module, weights)
        return module


class Compression:
    """A loaded module turned into the local model of a plan, and what has become of it after training."""

    def __init__(self, module: nn.Module, plan: CompressionPlan, given: Weights, seed: int) -> None:
        self.local = LocalModel(copy.deepcopy(uncompiled(module)), plan, seed)
        self._given = given
        self.start = self._weights()

    def _weights(self) -> dict[str, np.ndarray]:
        """The local model's weights in the dtypes that were given."""
        own = weights_of(self.local.module)
        return {name: array.astype(self._given[name].dtype, copy=False) for name, array in own.items()}

    def trained(self) -> dict[str, np.ndarray]:
        """The weights, once training is over."""
        self.local.settle()
        return self._weights()

    @property
    def masks(self) -> Mapping[str, np.ndarray]:
        """Where pruned tensors were kept."""
        return {name: mask.cpu().numpy() for name, mask in self.local.masks.items()}

"""Nested widths: a model and the narrower models inside it, trained in one step over one batch.

    loss = sum over the model and its prefixes of loss(prefix(x), y)    ordered dropout: FjORD, arXiv 2102.13451

The rule: a narrower model has no weights of its own. Its tensors are cut from the wider one's, so that all
gradients meet there, and the channels that small devices train stay useful to small and large devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedgrpc.submodels.channels import ChannelMap, SubModel
from fedgrpc.submodels.coverage import Coverage
from fedgrpc.torch.local_model.slicing import Shapes, resized, shapes_of


class Nested:
    """Prefix sub-models of `widths` within `module`, which is the whole model or a prefix sub-model of it.

    `whole` has the shapes of the whole model, to which `channel_map` and the widths refer. A width that is not
    narrower than the module is left out. The module's values are read at each call, since training changes them.
    """

    def __init__(self, module: nn.Module, channel_map: ChannelMap, whole: Shapes, widths: Sequence[float]) -> None:
        self._parameters = dict(module.named_parameters())
        own = shapes_of(module)
        self._narrow: list[tuple[nn.Module, Mapping[str, tuple[Tensor | None, ...]]]] = []
        for width in sorted(widths, reverse=True):
            selection = channel_map.select(SubModel(width))
            coverages = {name: selection.coverage(name, whole[name]) for name in own}
            shapes = {name: coverage.sub_shape for name, coverage in coverages.items()}
            if shapes != own and all(_within(shapes[name], own[name]) for name in own):
                places = {name: _places(coverages[name], own[name], whole[name]) for name in self._parameters}
                self._narrow.append((resized(module, shapes), places))

    def __len__(self) -> int:
        return len(self._narrow)

    def losses(self, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Iterator[Tensor]:
        """Yield `loss` of the outputs of each narrower model, the widest first."""
        for module, places in self._narrow:
            module.train()
            sliced = {name: _cut(tensor, places[name]) for name, tensor in self._parameters.items()}
            yield loss(functional_call(module, sliced, (inputs,)))


def _within(shape: tuple[int, ...], wider: tuple[int, ...]) -> bool:
    return all(extent <= other for extent, other in zip(shape, wider, strict=True))


def _places(coverage: Coverage, own: tuple[int, ...], whole: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """Return, for each axis, positions within the module's own tensor; None is the whole axis."""
    return tuple(map(_axis_places, coverage.positions, coverage.sub_shape, own, whole))


def _axis_places(taken: np.ndarray | None, kept: int, extent: int, whole: int) -> Tensor | None:
    if taken is None or kept == extent:
        return None
    if extent == whole:
        return torch.from_numpy(taken)
    # The module is a sub-model itself, and `taken` are positions in the whole model. Only the axis's extent is
    # known of the module's own tensor: each block of a prefix sub-model keeps its first channels.
    blocks = int(np.count_nonzero(np.diff(taken) > 1)) + 1
    within = np.arange(kept // blocks)
    return torch.from_numpy((np.arange(blocks)[:, None] * (extent // blocks) + within).reshape(-1))


def _cut(tensor: Tensor, places: tuple[Tensor | None, ...]) -> Tensor:
    for axis, positions in enumerate(places):
        if positions is None:
            continue
        count = len(positions)
        # The first channels are a view, which costs no copy in the forward pass.
        if int(positions[-1]) == count - 1:
            tensor = tensor.narrow(axis, 0, count)
        else:
            tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor

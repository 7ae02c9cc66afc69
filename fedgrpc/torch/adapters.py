"""Adapters of low rank for linear layers (LoRA, arXiv 2106.09685). A device trains as many directions as it can.

    y = W x + b + s up down x,    down [R, in],  up [out, R],  W and b as they are

A device of rank r has the first r rows of `down` and columns of `up`. Each direction is averaged over the devices
that have it, so the first ones learn from all. The factor s does not depend on r, and `up` starts at zero.

FlexLoRA (arXiv 2402.11505) averages the products up down instead, and cuts them to ranks by a singular value
decomposition. Then the mean is that of the layers' changes, while a mean of factors has mixed terms of several
devices. It costs the aggregator the memory of whole layers and a decomposition of each, in each round, and the
directions of a device change from round to round. Here they keep their meaning, so differences stay small and the
aggregator needs nothing that it does not do for channels.

The rule: what is frozen is constant. It travels with the first model that a device pulls, and never again.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import Axis, ChannelGroup, ChannelMap, Segment
from fedgrpc.submodels.plan import matches


class Adapter(nn.Module):
    """A linear layer that stays as it is, and beside it a product of rank `rank` that is trained."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self._scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        change = functional.linear(functional.linear(x, self.down), self.up)
        return self.base(x) + self._scale * change  # type: ignore[no-any-return]


def with_adapters(
    model: nn.Module,
    rank: int,
    layers: tuple[str, ...] = ("*",),
    trained: tuple[str, ...] = (),
    scale: float = 1.0,
) -> nn.Module:
    """Freeze `model` but for the tensors named in `trained`, and give an adapter to each `nn.Linear` of `layers`.

    Names may have * and ?. Load weights that the model is to start from before. Changes the model, and returns it.

    Raises:
        UsageError: there is no such layer, or no such rank.
    """
    if rank < 1:
        raise UsageError(f"an adapter has a rank from 1, not {rank}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(matches(name, trained))
    # Subclasses of nn.Linear may be used otherwise than by calling them, as in nn.MultiheadAttention.
    found = [
        name for name, each in model.named_modules() if type(each) is nn.Linear and name and matches(name, layers)
    ]
    if not found:
        raise UsageError(f"the model has no nn.Linear named {', '.join(layers)} to adapt")
    for name in found:
        parent, _, own = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, own, Adapter(getattr(owner, own), rank, scale))
    return model


def adapters_in(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each adapter's `down` and `up`. PEFT's layers have them as `lora_A` and `lora_B`."""
    found: list[tuple[str, str]] = []
    for name, each in module.named_modules():
        if isinstance(each, Adapter):
            found.append((f"{name}.down".lstrip("."), f"{name}.up".lstrip(".")))
        downs, ups = getattr(each, "lora_A", None), getattr(each, "lora_B", None)
        if isinstance(downs, nn.ModuleDict) and isinstance(ups, nn.ModuleDict):
            found += [(f"{name}.lora_A.{key}.weight", f"{name}.lora_B.{key}.weight") for key in downs]
    return found


def with_ranks(channel_map: ChannelMap, module: nn.Module) -> ChannelMap:
    """Mark the groups of `channel_map` that are the directions of the module's adapters."""
    axes = [channel_map.tensors[name][0] for name, _ in adapters_in(module) if name in channel_map.tensors]
    ranks = {segment.group for axis in axes for segment in axis}
    groups = tuple(
        replace(group, rank=True) if number in ranks else group for number, group in enumerate(channel_map.groups)
    )
    return replace(channel_map, groups=groups)


def ranks_alone(module: nn.Module) -> ChannelMap | None:
    """Return the map of the adapters' directions, for a module that is not traced; None without adapters.

    Directions are the first axis of `down` and the second of `up`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    pairs = [pair for pair in adapters_in(module) if shapes.keys() >= set(pair)]
    tensors: dict[str, tuple[Axis, ...]] = {}
    for group, (down, up) in enumerate(pairs):
        whole = {name: [(Segment(None, extent),) for extent in shapes[name]] for name in (down, up)}
        whole[down][0] = whole[up][1] = (Segment(group),)
        tensors |= {name: tuple(axes) for name, axes in whole.items()}
    groups = tuple(ChannelGroup(shapes[down][0], rank=True) for down, _ in pairs)
    return ChannelMap(groups, tensors) if pairs else None

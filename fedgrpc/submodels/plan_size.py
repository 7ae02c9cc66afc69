"""What a plan makes of a model's size: the numbers that its cost is predicted from. Pure arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedgrpc.submodels.channels import ChannelMap, SubModel, sub_shapes
from fedgrpc.submodels.cost import PlanSize, payload_bytes
from fedgrpc.submodels.plan import CompressionPlan

_ELEMENT_BYTES = 4


@dataclass(frozen=True)
class PlanElements:
    """How many elements a plan's slice has of how many in the whole model, and how many of them are sent back."""

    plan: CompressionPlan
    own: int
    sent: int
    whole: int

    def size(self, download_bits: float, upload_bits: float) -> PlanSize:
        """In bytes, at so many bits on the wire for each element; up, for each that is not pruned or clustered."""
        return PlanSize(
            self.own / max(1, self.whole),
            _ELEMENT_BYTES * self.own,
            math.ceil(self.own * download_bits / 8),
            payload_bytes(self.sent, upload_bits, self.plan),
            self.sent,
        )


def elements_of(
    plan: CompressionPlan, model: Mapping[str, tuple[int, ...]], channels: ChannelMap | None
) -> PlanElements:
    """Of a model whose tensors have these shapes, by name.

    Which channels a slice has makes no difference to its size; while nobody knows the channels, it is the whole.
    """
    shapes = model
    if channels is not None and plan.width < 1:
        shapes = sub_shapes(channels.select(SubModel(plan.width)), model)
    return PlanElements(
        plan,
        sum(math.prod(shape) for shape in shapes.values()),
        sum(math.prod(shape) for name, shape in shapes.items() if not plan.is_personal(name)),
        sum(math.prod(shape) for shape in model.values()),
    )

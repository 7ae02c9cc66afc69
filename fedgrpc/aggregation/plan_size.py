"""What a plan makes of a model's size: the numbers that its cost is predicted from. Pure arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedgrpc.aggregation import packed
from fedgrpc.aggregation.channels import ChannelMap, SubModel
from fedgrpc.aggregation.compression_plan import CompressionPlan
from fedgrpc.aggregation.prediction import PlanSize, payload_bytes
from fedgrpc.aggregation.update import TensorLike

_ELEMENT_BYTES = 4


def size_of(
    plan: CompressionPlan, layout: Sequence[TensorLike], channels: ChannelMap | None, bits_per_element: float
) -> PlanSize:
    """The plan's share of the model of that `layout`, and bytes at so many bits on the wire for each element.

    Which channels a slice has makes no difference to its size; while nobody knows the channels, it is the whole.
    """
    selection = None
    if channels is not None and plan.width < 1:
        selection = channels.select(SubModel(plan.width))
    shapes = packed.sub_layout(layout, selection)
    elements = sum(math.prod(shape) for shape in shapes.values())
    sent = sum(math.prod(shape) for name, shape in shapes.items() if not plan.is_personal(name))
    whole = max(1, sum(math.prod(tensor.shape) for tensor in layout))
    return PlanSize(
        elements / whole,
        _ELEMENT_BYTES * elements,
        math.ceil(elements * bits_per_element / 8),
        payload_bytes(sent, bits_per_element, plan),
    )

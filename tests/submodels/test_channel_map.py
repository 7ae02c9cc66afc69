"""A channel map comes from a worker: what does not fit the model is refused before any memory is taken."""

import pytest

from fedgrpc.errors import LayoutError
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment

SHAPES = {"w": (8, 4), "b": (8,)}
ROWS = (Segment(0),)
GOOD = {"w": (ROWS, (Segment(None, 4),)), "b": (ROWS,)}


def test_a_map_that_takes_every_element_once_is_valid():
    ChannelMap((ChannelGroup(8),), GOOD).validate(SHAPES)
    ChannelMap((ChannelGroup(4, 2),), {"b": ((Segment(0, 2),),)}).validate(SHAPES)
    ChannelMap((), {}).validate(SHAPES)


@pytest.mark.parametrize(
    ("groups", "tensors", "reason"),
    [
        ((ChannelGroup(8), ChannelGroup(1 << 60)), GOOD, "no tensor has channels of group 1"),
        ((ChannelGroup(1 << 60),), GOOD, "do not take its 8 elements"),
        ((ChannelGroup(0),), GOOD, "0 channels do not fall into 1 blocks"),
        ((ChannelGroup(8, 3),), GOOD, "8 channels do not fall into 3 blocks"),
        ((ChannelGroup(8),), {"x": (ROWS,)}, "no tensor 'x' of 1 axes"),
        ((ChannelGroup(8),), {"w": (ROWS,)}, "no tensor 'w' of 1 axes"),
        ((ChannelGroup(8),), {"b": ((Segment(0, 1 << 60),),)}, "do not take its 8 elements"),
        ((ChannelGroup(8),), {"b": ((Segment(0, 0),),)}, "do not take its 8 elements"),
        ((ChannelGroup(8),), {"b": ((Segment(1),),)}, "do not take its 8 elements"),
        ((ChannelGroup(4),), {"b": (ROWS,)}, "do not take its 8 elements"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused(groups, tensors, reason):
    with pytest.raises(LayoutError, match=reason):
        ChannelMap(groups, tensors).validate(SHAPES)

"""A channel map comes from a worker: what does not fit the model is refused before any memory is taken."""

import pytest

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment, SubModel, sub_shapes
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable

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


def test_blocks_are_of_tensors_that_there_are():
    ChannelMap((), {}, {"w": 1, "b": 65536}).validate(SHAPES)
    for blocks in ({"x": 1}, {"w": 0}, {"w": 65537}):
        with pytest.raises(LayoutError, match="no tensor"):
            ChannelMap((), {}, blocks).validate(SHAPES)


@pytest.mark.parametrize(
    ("sub_model", "text"),
    [
        (SubModel(depth=2), "prefix:1.0:depth=2"),
        (SubModel(0.5, "rolling", 12, 2, 4), "rolling:12:0.5:depth=2:rank=4"),
        (SubModel(0.25, rank=1), "prefix:0.25:rank=1"),
        (SubModel(), "whole"),
    ],
)
def test_the_text_of_a_sub_model_is_read_back(sub_model, text):
    assert str(sub_model) == text
    assert SubModel.parse(text) == sub_model
    assert sub_model.moves == text.startswith("rolling")


@pytest.mark.parametrize(
    "text",
    [
        "prefix:1.0:depth=x",
        "prefix:1.0:depth=-1",
        "prefix:1.0:size=2",
        "prefix:1.0:depth=1=2",
        "prefix:1:rank=70000",
    ],
)
def test_a_text_that_is_no_sub_model_is_refused(text):
    with pytest.raises(UsageError):
        SubModel.parse(text)


def test_a_sub_model_has_the_tensors_of_its_blocks_and_those_without_one():
    kept = ChannelMap((), {}, {"w": 1, "b": 2}).select(SubModel(depth=1))
    assert [name for name in ("w", "b", "n") if kept.has(name)] == ["w", "n"]
    assert sub_shapes(kept, SHAPES) == {"w": (8, 4)}


def test_a_plan_is_useless_for_a_model_with_nothing_for_it_to_cut():
    plans = PlanTable(LocalModelPlan(0.5, depth=2, rank=2))
    assert plans.useless_for(ChannelMap((ChannelGroup(8),), GOOD)) == {"depth", "rank"}
    assert plans.useless_for(ChannelMap((ChannelGroup(8, rank=True),), GOOD, {"w": 2})) == {"sub_model"}

"""Shares of a training step follow the layers of a model, as far as a worker has told their costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedgrpc.errors import LayoutError
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment
from fedgrpc.submodels.layer_cost import LayerCost, StepShares, check_costs, step_shares
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_size import elements_of

# Most of the work and of the activations is early, and most of the weights are late.
MODEL = {"early.weight": (8, 8), "late.weight": (8, 800), "late.bias": (8,)}
COSTS = (
    LayerCost("early.weight", 8e9, 8e6),
    LayerCost("late.bias", 0.0, 0.0),
    LayerCost("late.weight", 1e9, 1e6, 0.0, 4e6),
)
ROWS = (Segment(0),)
MAP = ChannelMap(
    (ChannelGroup(8),),
    {
        "early.weight": (ROWS, (Segment(None, 8),)),
        "late.weight": (ROWS, (Segment(0, 100),)),
        "late.bias": (ROWS,),
    },
    {"late.weight": 2, "late.bias": 2},
    COSTS,
)


def shares(plan: LocalModelPlan, channels: ChannelMap = MAP) -> StepShares:
    return elements_of(plan, MODEL, channels).size(8.0, 8.0).step_shares


def test_the_whole_model_takes_the_whole_step() -> None:
    whole = shares(LocalModelPlan())
    assert (whole.time, whole.kept) == (pytest.approx(1), pytest.approx(1))


def test_a_plan_without_late_layers_saves_weights_and_hardly_any_work() -> None:
    shallow = shares(LocalModelPlan(depth=1))
    assert elements_of(LocalModelPlan(depth=1), MODEL, MAP).own == 64
    assert shallow.time > 0.85
    assert shallow.kept == pytest.approx(8 / 9)


def test_a_plan_that_trains_late_layers_alone_goes_forward_through_all_and_back_through_these() -> None:
    last = shares(LocalModelPlan(trained_layers=("late.*",)))
    assert 1 / 3 < last.time < 0.5
    # The last layer keeps its inputs, which the first one would keep, too.
    assert last.kept == pytest.approx((1 + 4) / 9)
    assert shares(LocalModelPlan(trained_layers=("late.bias",))).kept == pytest.approx(5 / 9)


def test_activations_go_with_the_outputs_that_are_left() -> None:
    assert shares(LocalModelPlan(0.5)).kept == pytest.approx(0.5)


def test_inputs_go_with_the_inputs_that_are_left() -> None:
    # Of the late layer's inputs, one hundred of each channel, half are left. So are its outputs.
    told = replace(MAP, costs=(LayerCost("late.bias", 0, 0), LayerCost("late.weight", 1e9, 1e6, 4e6)))
    assert shares(LocalModelPlan(), told).kept == pytest.approx(1)
    assert shares(LocalModelPlan(0.5), told).kept == pytest.approx(0.5)
    first = replace(MAP, costs=(LayerCost("early.weight", 1e9, 1e6, 4e6),))
    assert shares(LocalModelPlan(0.5), first).kept == pytest.approx((0.5 + 4) / 5)


def test_only_ratios_of_costs_count() -> None:
    larger = tuple(
        replace(cost, kept_bytes=2 * cost.kept_bytes, shared_bytes=2 * cost.shared_bytes) for cost in COSTS
    )
    for plan in (LocalModelPlan(0.5), LocalModelPlan(trained_layers=("late.*",))):
        assert shares(plan, replace(MAP, costs=larger)).kept == pytest.approx(shares(plan).kept)


def test_without_costs_the_weights_tell() -> None:
    size = elements_of(LocalModelPlan(depth=1), MODEL, ChannelMap(MAP.groups, MAP.tensors, MAP.blocks)).size(8, 8)
    assert size.step_shares == StepShares.of_weights(64 / 6472)


@pytest.mark.parametrize(
    "costs",
    [
        (LayerCost("x", 1, 1),),
        (LayerCost("late.bias", -1, 1),),
        (LayerCost("late.bias", 1, math.nan),),
        (LayerCost("late.bias", 1, 1, math.inf),),
        (LayerCost("late.bias", 1, 1, 1, -1.0),),
        (LayerCost("late.bias", 1, 1), LayerCost("late.bias", 1, 1)),
    ],
)
def test_costs_that_cannot_be_are_refused(costs: tuple[LayerCost, ...]) -> None:
    with pytest.raises(LayoutError):
        check_costs(costs, MODEL)


def test_costs_of_zero_are_no_division_by_zero() -> None:
    nothing = tuple(LayerCost(name, 0.0, 0.0) for name in MODEL)
    found = step_shares(nothing, MODEL, MODEL, lambda name: name == "late.bias")
    assert 0 < found.time < 1
    assert found.kept >= 0

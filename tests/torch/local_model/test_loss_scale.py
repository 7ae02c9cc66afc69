"""Gradients below a format's smallest number survive when the loss is scaled; steps are those of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedgrpc.errors import UsageError
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan
from fedgrpc.torch.local_model.formats import parse_format
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.loss_scale import GROWTH_STEPS, LossScale
from fedgrpc.torch.optimizer import MomentumSgd

FORMATS = ("float16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "fixed16.10")


def trained(arithmetic: Arithmetic, gradient: float, rate: float, steps: int = 1, momentum: float = 0.0) -> float:
    """A weight that starts at 0 after steps along a gradient that is always the same."""
    torch.set_num_threads(1)
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    local = LocalModel(module, LocalModelPlan(arithmetic=arithmetic))
    parameters = list(module.parameters())
    optimizer = MomentumSgd(parameters, rate, momentum, 0.0)
    scaling = local.loss_scale()
    scaled = None if scaling is None else scaling.prepare(optimizer)
    half = gradient**0.5
    with local.arithmetic():
        for _ in range(steps):
            module.weight.grad = None
            loss = (local(torch.tensor([[half]])) * half).sum()
            if scaling is None or scaled is None:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            else:
                scaling.backward(loss)
                scaling.step(scaled, parameters)
    return float(module.weight.detach())


@pytest.mark.parametrize("name", FORMATS)
def test_a_gradient_below_the_smallest_number_survives_only_with_a_loss_scale(name: str) -> None:
    """Its square root is a number of the format, the gradient itself is far below, and the step is one again."""
    smallest = parse_format(name).smallest
    gradient = 2.0 ** (2 * (round(torch.log2(torch.tensor(smallest)).item()) // 2) - 2)
    rate = 4 * smallest / gradient
    assert gradient < smallest / 2
    assert trained(Arithmetic(name, emulated=True), gradient, rate) == 0
    assert trained(Arithmetic(name, emulated=True, loss_scale=16.0), gradient, rate) == -4 * smallest
    assert trained(Arithmetic(name, dynamic_loss_scale=True), gradient, rate) == -4 * smallest


def test_native_float16_keeps_them_too() -> None:
    gradient, rate = 2.0**-26, 2.0**15
    assert trained(Arithmetic("float16"), gradient, rate) == 0
    assert trained(Arithmetic("float16", loss_scale=1024.0), gradient, rate) == -(2.0**-11)


def test_where_nothing_is_lost_the_steps_are_the_same_bit_for_bit() -> None:
    plain = trained(Arithmetic("float32"), 0.25, 0.125, steps=5, momentum=0.875)
    assert plain != 0
    for scaled in (Arithmetic("float32", loss_scale=512.0), Arithmetic("float32", dynamic_loss_scale=True)):
        assert trained(scaled, 0.25, 0.125, steps=5, momentum=0.875) == plain


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn", "fixed16.10"])
def test_a_dynamic_scale_halves_without_a_step_until_nothing_overflows(name: str) -> None:
    """A gradient of 16: after the skipped steps the others are the plain ones."""
    largest = parse_format(name).largest
    weight = nn.Parameter(torch.zeros(1))
    scaling = LossScale(Arithmetic(name, dynamic_loss_scale=True), parse_format(name))
    optimizer = MomentumSgd([weight], 2.0**-6, 0.0, 0.0)
    scaled = scaling.prepare(optimizer)
    begun, moved = scaling.scale, 0
    for _ in range(20):
        before = float(weight.detach())
        scaling_was = scaling.scale
        weight.grad = parse_format(name).round(torch.full((1,), 16.0 * scaling.scale))
        scaling.step(scaled, [weight])
        if 16.0 * scaling_was > largest:
            assert (float(weight.detach()), scaling.scale) == (before, scaling_was / 2)
        else:
            moved += 1
            assert float(weight.detach()) == before - 0.25
    assert begun <= largest
    assert 16 * scaling.scale <= largest
    assert moved


def test_a_dynamic_scale_doubles_after_many_steps_and_velocities_go_with_it() -> None:
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    scaling = LossScale(Arithmetic("float32", loss_scale=4.0, dynamic_loss_scale=True), parse_format("float32"))
    plain, other = (MomentumSgd([weight], 2.0**-10, 0.5, 2.0**-4) for weight in weights)
    scaled = scaling.prepare(other)
    for _ in range(GROWTH_STEPS + 10):
        weights[0].grad, weights[1].grad = torch.ones(1), torch.full((1,), scaling.scale)
        plain.step()
        scaling.step(scaled, [weights[1]])
    assert scaling.scale == 8
    torch.testing.assert_close(weights[0], weights[1])


def test_at_a_scale_of_one_a_gradient_that_is_not_finite_is_the_trainings_own() -> None:
    weight = nn.Parameter(torch.zeros(1))
    scaling = LossScale(Arithmetic("float16", loss_scale=2.0, dynamic_loss_scale=True), parse_format("float16"))
    scaled = scaling.prepare(MomentumSgd([weight], 1.0, 0.0, 0.0))
    for _ in range(2):
        weight.grad = torch.full((1,), torch.inf)
        scaling.step(scaled, [weight])
    assert not torch.isfinite(weight).all()


def test_a_scale_that_the_format_does_not_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="1024 is more than float8_e4m3fn holds: 448"):
        LossScale(Arithmetic("float8_e4m3fn", loss_scale=1024.0), parse_format("float8_e4m3fn"))


def test_an_optimizer_that_does_not_follow_the_gradients_size_is_refused() -> None:
    scaling = LossScale(Arithmetic("float16", loss_scale=8.0), parse_format("float16"))
    with pytest.raises(UsageError, match="goes with SGD"):
        scaling.prepare(torch.optim.Adam([nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize("scale", [0.5, 0.0, 3.0, -2.0, float("nan"), float("inf")])
def test_a_loss_scale_is_a_power_of_two(scale: float) -> None:
    with pytest.raises(UsageError, match="power of two"):
        Arithmetic("float16", loss_scale=scale)

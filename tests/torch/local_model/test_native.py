"""16-bit types of torch train in half the memory, and small steps are not lost if the plan says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan
from fedgrpc.torch.local_model.formats import BFLOAT16
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.native import SHORT, ShortWeights, WideProducts
from fedgrpc.torch.memory import TensorBytes
from fedgrpc.torch.optimizer import MomentumSgd, Optimizer

LAYERS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 8, 3, dilation=2, groups=4, bias=False),
    nn.Conv2d(4, 6, 3, padding="same"),
    nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 5)),
    nn.Sequential(nn.Linear(8, 5, bias=False)),
    nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 3, 5, padding=2)),
]


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_product_is_that_of_float32_rounded_once(layer: nn.Module, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer.to(dtype)
    inputs = torch.randn(3, 4, 8, 8, generator=generator).to(dtype).requires_grad_()
    with WideProducts():
        outputs = layer(inputs)
    gradient = torch.randn(outputs.shape, generator=generator).to(dtype)
    found = torch.autograd.grad(outputs, [inputs, *layer.parameters()], gradient)

    wide = layer.float()
    given = inputs.detach().float().requires_grad_()
    wanted = wide(given)
    torch.testing.assert_close(outputs.float(), wanted.to(dtype).float(), rtol=2**-7, atol=1e-5)
    exact = torch.autograd.grad(wanted, [given, *wide.parameters()], gradient.float())
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype is dtype
        torch.testing.assert_close(mine.float(), theirs.to(dtype).float(), rtol=2**-7, atol=1e-5)


def test_other_types_and_operations_are_left_alone() -> None:
    values = torch.randn(2, 3)
    with WideProducts():
        assert torch.equal(functional.linear(values, values), values @ values.t())
        assert (values.bfloat16() + 1).dtype is torch.bfloat16


def stepped(optimizer: Optimizer, weight: nn.Parameter, steps: int, gradient: float) -> Tensor:
    for _ in range(steps):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return weight.detach().double()


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return MomentumSgd(parameters, 0.1, 0.0, 0.0)


def ones() -> nn.Parameter:
    return nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))


def test_steps_below_the_types_resolution_are_lost_without_and_kept_with_a_copy_or_stochastic_rounding() -> None:
    # bfloat16 has no number between 0.99609375 and 1; a step is an eighth of that distance.
    gradient = 10 * 2**-11
    plain, copied, drawn = ones(), ones(), ones()
    assert stepped(sgd([plain]), plain, 40, gradient).eq(1).all()
    wanted = 1 - 40 * 2**-11
    exact = stepped(ShortWeights([copied], sgd, BFLOAT16, True, 0), copied, 40, gradient)
    assert exact.eq(torch.tensor(wanted).bfloat16().double()).all()
    mean = stepped(ShortWeights([drawn], sgd, BFLOAT16, False, 0), drawn, 40, gradient).mean()
    # The spread of a weight is below 2^-8 * sqrt(40 / 8); that of the mean of 20000 a hundred times smaller.
    assert float(mean) == pytest.approx(wanted, abs=4 * 2**-8 * 5**0.5 / 141)


def test_stochastic_rounding_draws_the_same_from_the_same_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        weight = ones()
        found.append(stepped(ShortWeights([weight], sgd, BFLOAT16, False, seed), weight, 3, 0.01))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("copy", "kept"), [(False, 1), (True, 2)])
def test_velocities_and_copies_are_what_is_kept_in_float32(copy: bool, kept: int) -> None:
    weight = ones()
    optimizer = ShortWeights([weight], lambda given: MomentumSgd(given, 0.1, 0.9, 0.0), BFLOAT16, copy, 0)
    stepped(optimizer, weight, 2, 0.1)
    assert TensorBytes([weight]).total(optimizer) == 20_000 * (2 + 2 + 4 * kept)


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic("bfloat16", "stochastic"),
        Arithmetic("bfloat16", float32_copy=True),
        Arithmetic("float16", "stochastic", loss_scale=64.0),
        Arithmetic("float16", float32_copy=True, dynamic_loss_scale=True),
    ],
    ids=str,
)
def test_a_local_model_of_16_bits_learns(arithmetic: Arithmetic) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    local = LocalModel(model, LocalModelPlan(arithmetic=arithmetic), seed=3)
    inputs, targets = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    parameters = list(local.module.parameters())
    optimizer = local.optimizer(parameters, lambda given: MomentumSgd(given, 0.1, 0.9, 0.0))
    assert isinstance(optimizer, ShortWeights)
    scaling = local.loss_scale()
    if scaling is not None:
        scaling.prepare(optimizer)
    losses = []
    with local.training():
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = None
            loss = functional.cross_entropy(local(inputs), targets)
            if scaling is None:
                loss.backward()
                optimizer.step()
            else:
                scaling.backward(loss)
                scaling.step(optimizer, parameters)
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert {parameter.dtype for parameter in parameters} == {getattr(torch, arithmetic.format)}

"""Within an emulation, nothing that training computes is more than the format can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.torch.local_model.emulate import Emulation, round_module
from fedgrpc.torch.local_model.formats import (
    BFLOAT16,
    FLOAT8_E4M3,
    FLOAT16,
    FLOAT24,
    FLOAT64,
    FixedFormat,
    FloatFormat,
    NumberFormat,
    parse_format,
)
from fedgrpc.torch.models import build_model
from fedgrpc.torch.optimizer import MomentumSgd

FORMATS: list[NumberFormat] = [FLOAT16, BFLOAT16, FLOAT24, FLOAT8_E4M3, FloatFormat(6, 7), FixedFormat(16, 10)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def is_rounded(tensor: Tensor, number_format: NumberFormat) -> bool:
    return torch.equal(number_format.round(tensor.detach()), tensor.detach())


def train(
    model: nn.Module, number_format: NumberFormat, optimizer: Any, steps: int, mode: Emulation
) -> list[float]:
    inputs = number_format.round(torch.randn(16, 1, 28, 28, dtype=number_format.carrier))
    targets = torch.arange(16) % 10
    losses = []
    with mode:
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = None
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_weights_activations_gradients_and_optimizer_state_are_all_of_the_format(
    number_format: NumberFormat,
) -> None:
    model = build_model("lenet", num_classes=10, in_channels=1, image_size=28)
    round_module(model, number_format)
    seen: list[Tensor] = []
    for module in list(model.modules())[1:]:
        module.register_forward_hook(lambda _, inputs, output: seen.append(output))
        module.register_full_backward_hook(
            lambda _, into, out: seen.extend(g for g in (*into, *out) if g is not None)
        )
    optimizer = MomentumSgd(model.parameters(), 0.05, 0.9, 1e-4)
    train(model, number_format, optimizer, 3, Emulation(number_format))
    assert len(seen) > 30
    seen += [
        tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad) if tensor is not None
    ]
    seen += [velocity for velocity in optimizer._velocities if velocity is not None]
    assert all(is_rounded(tensor, number_format) for tensor in seen)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_torchs_own_optimizers_are_rounded_too(kind: Any, foreach: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    round_module(model, FLOAT16)
    # The default eps of Adam, 1e-8, is zero in float16.
    options: dict[str, float] = {"momentum": 0.9} if kind is torch.optim.SGD else {"eps": 1e-3}
    optimizer = kind(model.parameters(), lr=0.01, foreach=foreach, **options)
    train(model, FLOAT16, optimizer, 3, Emulation(FLOAT16))
    state = [value for entry in optimizer.state.values() for name, value in entry.items() if name != "step"]
    assert state
    assert all(is_rounded(tensor, FLOAT16) for tensor in [*state, *model.parameters()])


@pytest.mark.parametrize(("number_format", "native"), [(FLOAT16, torch.float16), (BFLOAT16, torch.bfloat16)])
def test_elementwise_arithmetic_is_bit_for_bit_that_of_the_native_type(
    number_format: FloatFormat, native: torch.dtype
) -> None:
    def arithmetic(a: Tensor, b: Tensor) -> Tensor:
        c = a * b + a / (b.abs() + 1)
        c -= a.sqrt() * 0.5
        return c.mul_(b).add_(a)

    values = torch.rand(2, 100_000) * 64
    a, b = values[0].to(native), values[1].to(native) - 32
    with Emulation(number_format):
        emulated = arithmetic(a.float(), b.float())
    assert torch.equal(emulated, arithmetic(a, b).float())


def test_training_in_float64_is_plain_float64_training() -> None:
    results = []
    for emulated in (False, True):
        torch.manual_seed(1)
        model = build_model("lenet", num_classes=10, in_channels=1, image_size=28).double()
        optimizer = MomentumSgd(model.parameters(), 0.05, 0.9, 1e-3)
        mode: Any = Emulation(FLOAT64) if emulated else torch.enable_grad()
        train(model, FLOAT64, optimizer, 4, mode)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, plain, rtol=1e-12, atol=1e-14)


def test_training_in_sixteen_bits_learns() -> None:
    model = build_model("lenet", num_classes=10, in_channels=1, image_size=28)
    round_module(model, FLOAT16)
    losses = train(model, FLOAT16, MomentumSgd(model.parameters(), 0.05, 0.9, 0.0), 30, Emulation(FLOAT16))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("rounding", "moves"), [("nearest", False), ("stochastic", True)])
def test_steps_below_half_a_spacing_are_lost_by_nearest_and_kept_in_the_mean_by_stochastic_rounding(
    rounding: str, moves: bool
) -> None:
    weights = nn.Parameter(torch.ones(4000))
    optimizer = MomentumSgd([weights], 1.0, 0.0, 0.0)
    step = FLOAT8_E4M3.round(torch.tensor(2**-6))  # below 1 the spacing is 2^-4
    with Emulation(FLOAT8_E4M3, rounding, seed=3):
        weights.grad = torch.full((4000,), float(step))
        optimizer.step()
    assert bool((weights < 1).any()) == moves
    if moves:
        assert abs(float(weights.detach().mean()) - (1 - 2**-6)) < 0.003


def test_the_module_is_as_before_and_so_is_arithmetic_outside() -> None:
    model = build_model("mlp", num_classes=10, in_channels=1, image_size=28)
    names = list(model.state_dict())
    round_module(model, FLOAT8_E4M3)
    train(model, FLOAT8_E4M3, MomentumSgd(model.parameters(), 0.1, 0.0, 0.0), 1, Emulation(FLOAT8_E4M3))
    assert list(model.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (torch.tensor(1.0) + 0.001).item() != 1.0


@pytest.mark.parametrize("name", ["float8_e4m3fn", "fixed16.10"])
def test_a_batch_of_more_examples_than_the_format_can_count_has_a_finite_gradient(name: str) -> None:
    """1000 is beyond 448, and beyond 32; the gradient of each example's logits is a thousandth of p - y."""
    logits = torch.zeros(1000, 2, requires_grad=True)
    with Emulation(parse_format(name), "stochastic", seed=0):
        functional.cross_entropy(logits, torch.arange(1000) % 2).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # Half of a thousandth is less than the smallest number, and so many of them are none or that number.
    assert logits.grad.abs().mean().item() == pytest.approx(0.0005, rel=0.2)

"""Products that round every multiply and every partial sum are those of a naive loop with gfloat's rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
import pytest
import torch
from gfloat import RoundMode, round_float
from torch import nn
from torch.nn import functional

from fedgrpc.errors import UsageError
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan
from fedgrpc.torch.local_model.emulate import Emulation, round_module
from fedgrpc.torch.local_model.formats import BFLOAT16, FLOAT8_E4M3, FloatFormat
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.models import build_model
from fedgrpc.torch.optimizer import MomentumSgd
from tests.torch.local_model.test_formats import oracle

FORMATS = [BFLOAT16, FLOAT8_E4M3]
Round = Callable[[float], float]
Shape = tuple[int, ...]


def rounding_of(number_format: FloatFormat) -> Round:
    info = oracle(number_format)
    return lambda value: round_float(info, float(value), RoundMode.TiesToEven)


def summed(terms: Iterable[float], rounded: Round) -> float:
    found = 0.0
    for term in terms:
        found = rounded(found + term)
    return found


def indices(shape: Shape) -> Iterable[Shape]:
    return product(*map(range, shape))


class NaiveConvolution:
    """A convolution, one scalar at a time, with a kernel of 3 by 3."""

    def __init__(self, weight: np.ndarray, stride: int, padding: int, groups: int, rounded: Round) -> None:
        self.weight, self.stride, self.padding, self.rounded = weight, stride, padding, rounded
        self.out_each, self.in_each = weight.shape[0] // groups, weight.shape[1]

    def reached(self, padded: np.ndarray, image: int, out: int, place: Shape, tap: Shape) -> Shape:
        channel = out // self.out_each * self.in_each + tap[0]
        return image, channel, place[0] * self.stride + tap[1], place[1] * self.stride + tap[2]

    def padded(self, images: np.ndarray) -> np.ndarray:
        pad = (self.padding, self.padding)
        return np.pad(images, ((0, 0), (0, 0), pad, pad))

    def forward(self, images: np.ndarray, bias: np.ndarray, extent: int) -> np.ndarray:
        padded, weight = self.padded(images), self.weight
        found = np.zeros((len(images), len(weight), extent, extent))
        for image, out, *place in indices(found.shape):
            terms = (
                self.rounded(weight[(out, *tap)] * padded[self.reached(padded, image, out, tuple(place), tap)])
                for tap in indices(weight.shape[1:])
            )
            found[image, out, *place] = self.rounded(summed(terms, self.rounded) + bias[out])
        return found

    def backward(self, images: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of the images, the weight and the bias."""
        padded, weight, places = self.padded(images), self.weight, tuple(indices(given.shape[2:]))
        of_weight, of_padded = np.zeros(weight.shape), np.zeros(padded.shape)
        for out, *tap in indices(weight.shape):
            of_weight[out, *tap] = summed(
                (
                    self.rounded(
                        given[image, out, *place] * padded[self.reached(padded, image, out, place, tuple(tap))]
                    )
                    for image in range(len(images))
                    for place in places
                ),
                self.rounded,
            )
        groups = len(weight) // self.out_each
        for image, group, *tap in indices((len(images), groups, *weight.shape[1:])):
            outs = range(group * self.out_each, (group + 1) * self.out_each)
            for place in places:
                terms = (self.rounded(weight[out, *tap] * given[image, out, *place]) for out in outs)
                at = self.reached(padded, image, outs[0], place, tuple(tap))
                of_padded[at] = self.rounded(of_padded[at] + summed(terms, self.rounded))
        inside = slice(self.padding, padded.shape[2] - self.padding)
        of_bias = [summed(given[:, out].reshape(-1), self.rounded) for out in range(len(weight))]
        return of_padded[:, :, inside, inside], of_weight, np.array(of_bias)


def naive_product(left: np.ndarray, right: np.ndarray, rounded: Round) -> np.ndarray:
    found = np.zeros((left.shape[0], right.shape[1]))
    for row, column in indices(found.shape):
        terms = (rounded(left[row, k] * right[k, column]) for k in range(left.shape[1]))
        found[row, column] = summed(terms, rounded)
    return found


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (2, 1, 2)])
def test_forward_backward_and_a_step_are_bit_for_bit_those_of_a_naive_loop(
    number_format: FloatFormat, stride: int, padding: int, groups: int
) -> None:
    torch.manual_seed(0)
    rounded = rounding_of(number_format)
    convolution = nn.Conv2d(2, 4, 3, stride, padding, groups=groups)
    extent = (5 + 2 * padding - 3) // stride + 1
    linear = nn.Linear(4 * extent * extent, 3)
    for module in (convolution, linear):
        round_module(module, number_format)
    parameters = [*convolution.parameters(), *linear.parameters()]
    weight, bias, matrix, offset = (parameter.detach().double().numpy().copy() for parameter in parameters)
    images = number_format.round(torch.randn(2, 2, 5, 5)).requires_grad_()
    given = number_format.round(torch.randn(2, 3))

    with Emulation(number_format, accumulate="format"):
        hidden = convolution(images)
        outputs = linear(functional.relu(hidden).flatten(1))
        outputs.backward(given)
        MomentumSgd(parameters, 1.0, 0.0, 0.0).step()

    naive = NaiveConvolution(weight, stride, padding, groups, rounded)
    inputs, errors = images.detach().double().numpy(), given.double().numpy()
    before = naive.forward(inputs, bias, extent)
    rows = np.maximum(before, 0).reshape(2, -1)
    wanted = naive_product(rows, matrix.T, rounded)
    wanted_outputs = np.vectorize(rounded)(wanted + offset)
    back = naive_product(errors, matrix, rounded).reshape(before.shape) * (before > 0)
    of_images, of_weight, of_bias = naive.backward(inputs, back)
    of_matrix = naive_product(errors.T, rows, rounded)
    of_offset = np.array([summed(errors[:, column], rounded) for column in range(3)])

    assert images.grad is not None
    found = [hidden, outputs, images.grad, *(parameter.grad for parameter in parameters)]
    for tensor, array in zip(
        found, [before, wanted_outputs, of_images, of_weight, of_bias, of_matrix, of_offset], strict=True
    ):
        assert tensor is not None
        assert np.array_equal(tensor.detach().double().numpy(), array)
    steps = zip(
        parameters, (weight, bias, matrix, offset), (of_weight, of_bias, of_matrix, of_offset), strict=True
    )
    for parameter, start, gradient in steps:
        assert np.array_equal(parameter.detach().double().numpy(), np.vectorize(rounded)(start - gradient))


def test_one_rounding_for_each_operation_gives_other_bits() -> None:
    torch.manual_seed(0)
    left, right = (BFLOAT16.round(torch.randn(8, 64)), BFLOAT16.round(torch.randn(64, 8)))
    with Emulation(BFLOAT16):
        wide = left @ right
    with Emulation(BFLOAT16, accumulate="format"):
        narrow = left @ right
        batched = torch.bmm(left[None], right[None])
        column, element = left @ right[:, 0], left[0] @ right[:, 0]
    assert not torch.equal(wide, narrow)
    assert torch.equal(batched[0], narrow)
    assert torch.equal(column, narrow[:, 0])
    assert torch.equal(element, narrow[0, 0])


def test_a_model_that_is_too_large_for_it_is_refused_in_one_line() -> None:
    plan = LocalModelPlan(arithmetic=Arithmetic("bfloat16", emulated=True, accumulate="format"))
    LocalModel(build_model("lenet", num_classes=10, in_channels=1, image_size=28), plan)
    with pytest.raises(UsageError, match="1000000 weights, not 1001000") as refused:
        LocalModel(nn.Linear(1000, 1000), plan)
    assert "\n" not in str(refused.value)


def test_convolutions_that_it_does_not_know_are_refused() -> None:
    layer = nn.ConvTranspose2d(1, 1, 3)
    with Emulation(FLOAT8_E4M3, accumulate="format"), pytest.raises(UsageError, match="transposed"):
        layer(torch.zeros(1, 1, 4, 4))


def test_a_plan_accumulates_in_an_emulated_format_only() -> None:
    with pytest.raises(UsageError, match="emulated"):
        LocalModelPlan(arithmetic=Arithmetic("bfloat16", accumulate="format"))
    with pytest.raises(UsageError, match="accumulate"):
        Arithmetic("fixed8.5", accumulate="wide")
    plan = LocalModelPlan(arithmetic=Arithmetic("fixed8.5", accumulate="format"))
    assert LocalModelPlan.from_toml(plan.to_toml()) == plan

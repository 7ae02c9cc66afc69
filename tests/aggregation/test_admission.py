"""One bad worker never hurts the run: each way in which an update can be wrong is refused with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgrpc.aggregation.admission import (
    AdmissionPolicy,
    check_counts,
    check_layout,
    check_values,
    sum_of_squares,
)
from fedgrpc.errors import UpdateRefused


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: str = "float32"
    shape: tuple[int, ...] = (2, 3)
    role: str = "parameter"

    @property
    def is_trained(self) -> bool:
        return self.role == "parameter" and self.dtype == "float32"


MODEL = [Spec("conv.weight"), Spec("conv.bias", shape=(2,)), Spec("steps", "int64", ())]


def test_the_model_s_own_layout_is_admitted_in_any_order() -> None:
    check_layout(MODEL, MODEL)
    check_layout(MODEL, MODEL[::-1])


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (MODEL[1:], "tensor 'conv.weight' is missing"),
        (MODEL[:1], "tensor 'conv.bias' is missing, and 1 more"),
        ([], "tensor 'conv.bias' is missing, and 2 more"),
        ([*MODEL, Spec("extra")], "the model has no tensor 'extra'"),
        (
            [Spec("conv.weight", shape=(3, 2)), *MODEL[1:]],
            "tensor 'conv.weight' is float32[3, 2], the model's is float32[2, 3]",
        ),
        (
            [Spec("conv.weight", "float64"), *MODEL[1:]],
            "tensor 'conv.weight' is float64[2, 3], the model's is float32[2, 3]",
        ),
        (
            [MODEL[0], Spec("conv.bias", shape=(1,)), MODEL[2]],
            "tensor 'conv.bias' is float32[1], the model's is float32[2]",
        ),
        ([*MODEL[:2], Spec("steps", "int64", (1,))], "tensor 'steps' is int64[1], the model's is int64[]"),
    ],
    ids=["missing", "several missing", "empty", "extra", "transposed", "wider", "broadcastable", "one element"],
)
def test_another_layout_is_refused_with_the_first_difference(update: list[Spec], reason: str) -> None:
    with pytest.raises(UpdateRefused) as caught:
        check_layout(MODEL, update)
    assert str(caught.value) == reason


def test_a_tensor_listed_twice_is_refused() -> None:
    with pytest.raises(UpdateRefused, match=r"'conv\.bias' is listed twice"):
        check_layout(MODEL, [*MODEL, MODEL[1]])


@pytest.mark.parametrize("count", [0, -1, 101])
def test_a_count_of_examples_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(UpdateRefused, match=f"example count {count} is not from 1 to 100"):
        check_counts(count, {}, AdmissionPolicy(max_example_count=100))


@pytest.mark.parametrize("count", [1, 100])
def test_a_count_of_examples_in_range_is_admitted(count: int) -> None:
    check_counts(count, {"loss": 0.5}, AdmissionPolicy(max_example_count=100))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UpdateRefused, match="metric 'loss' is"):
        check_counts(1, {"accuracy": 0.5, "loss": value}, AdmissionPolicy())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 65_535, 65_536, -1])
def test_one_value_that_is_not_finite_is_found_wherever_it_hides(dtype: type, bad: float, place: int) -> None:
    values: np.ndarray = np.zeros(70_000, dtype=dtype)
    values[place] = bad
    with pytest.raises(UpdateRefused, match="'w' has values that are not finite"):
        check_values([(Spec("ok"), np.ones(3)), (Spec("w"), values)], AdmissionPolicy())


def test_opposite_infinities_do_not_hide_each_other() -> None:
    with pytest.raises(UpdateRefused):
        check_values([(Spec("w"), np.array([math.inf, -math.inf]))], AdmissionPolicy())


def test_values_too_large_to_square_are_refused() -> None:
    with pytest.raises(UpdateRefused, match="too large to square"):
        check_values([(Spec("w", "float64"), np.array([1e200]))], AdmissionPolicy())


def test_the_norm_is_that_of_all_float_tensors_together() -> None:
    tensors = [(Spec("a"), np.array([3.0])), (Spec("b"), np.array([[4.0]], dtype=np.float32))]
    assert check_values(tensors, AdmissionPolicy(max_norm=5.0)) == 5.0
    with pytest.raises(UpdateRefused, match=r"norm 5 is over the bound 4\.99"):
        check_values(tensors, AdmissionPolicy(max_norm=4.99))


def test_whole_numbers_are_no_part_of_the_norm() -> None:
    tensors = [(Spec("steps", "int64"), np.array([10**12])), (Spec("mask", "bool"), np.array([True]))]
    assert check_values(tensors, AdmissionPolicy(max_norm=1.0)) == 0.0


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-1e10, 1e10, width=32)))
def test_the_sum_of_squares_is_numpy_s_to_float32_s_precision(values: np.ndarray) -> None:
    before = values.copy()
    exact = np.sum(values.astype(np.float64) ** 2)
    np.testing.assert_allclose(sum_of_squares(values), exact, rtol=1e-4, atol=1e-35)
    np.testing.assert_array_equal(values, before)

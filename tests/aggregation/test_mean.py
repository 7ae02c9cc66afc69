from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgrpc.aggregation.mean import TensorMean, mean_metrics, mean_of

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, max_side=5) | st.just((0,)) | st.just((70_000,))
DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int64, np.bool_])


@st.composite
def updates(draw: st.DrawFn) -> list[tuple[np.ndarray, float]]:
    shape, dtype = draw(SHAPES), np.dtype(draw(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 5))
    weights = draw(st.lists(st.floats(1e-3, 1e6), min_size=count, max_size=count))
    return [((rng.standard_normal(shape) * 100).astype(dtype), weight) for weight in weights]


def dumb_mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """One coordinate at a time, in Python floats."""
    mean = np.zeros(values[0].shape)
    for index in np.ndindex(values[0].shape):
        mean[index] = sum(float(v[index]) * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return mean


@given(updates())
def test_the_mean_is_what_a_dumb_loop_says(pairs: list[tuple[np.ndarray, float]]) -> None:
    values, weights = zip(*pairs, strict=True)
    mean = mean_of(pairs, values[0].shape)
    assert mean.dtype == np.float64
    if mean.size > 1000:
        expected = np.stack(
            [dumb_mean([v[i : i + 1] for v in values], weights)[0] for i in (0, 65_535, 65_536, -2)]
        )
        mean = mean[[0, 65_535, 65_536, -2]]
    else:
        expected = dumb_mean(values, weights)
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-9)


@given(updates())
def test_updates_stay_as_they_are(pairs: list[tuple[np.ndarray, float]]) -> None:
    before = [values.copy() for values, _ in pairs]
    mean_of(pairs, pairs[0][0].shape)
    assert all(np.array_equal(was, values) for was, (values, _) in zip(before, pairs, strict=True))


@given(updates())
def test_the_same_updates_in_the_same_order_give_the_same_bits(pairs: list[tuple[np.ndarray, float]]) -> None:
    shape = pairs[0][0].shape
    assert mean_of(pairs, shape).tobytes() == mean_of(iter(pairs), shape).tobytes()


def test_the_order_of_addition_moves_the_mean_by_rounding_only() -> None:
    """Why commits add in slot order: bits differ between orders, though never by more than float64's rounding."""
    rng = np.random.default_rng(5)
    pairs = [(rng.standard_normal(1000).astype(np.float32), float(rng.uniform(1, 100))) for _ in range(5)]
    means = [mean_of(order, (1000,)) for order in permutations(pairs)]
    assert len({mean.tobytes() for mean in means}) > 1
    assert max(np.abs(mean - means[0]).max() for mean in means) < 1e-14


def test_equal_updates_have_themselves_as_mean() -> None:
    values = np.array([1.5, -2.0, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(mean_of([(values, 3.0), (values, 5.0)], (3,)), values)


def test_an_update_of_weight_zero_changes_nothing() -> None:
    a, b = np.array([1.0]), np.array([5.0])
    assert mean_of([(a, 2.0), (b, 0.0)], (1,)) == a


def test_a_sum_of_many_small_updates_loses_nothing_to_float32() -> None:
    tiny = np.full(4, 1e-4, dtype=np.float32)
    mean = TensorMean((4,))
    mean.add(np.ones(4, dtype=np.float32), 1.0)
    for _ in range(10_000):
        mean.add(tiny, 1.0)
    np.testing.assert_allclose(mean.result(), (1 + 10_000 * float(tiny[0])) / 10_001, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3, 3), (), (1,)])
def test_a_wrong_shape_is_refused_and_never_broadcast(shape: tuple[int, ...]) -> None:
    mean = TensorMean((3,))
    with pytest.raises(ValueError, match="is not"):
        mean.add(np.zeros(shape), 1.0)
    mean.add(np.ones(3), 1.0)
    np.testing.assert_array_equal(mean.result(), np.ones(3))


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0]])
def test_a_mean_of_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        mean_of([(np.zeros(2), weight) for weight in weights], (2,))


def test_each_metric_is_averaged_over_those_who_report_it() -> None:
    reports = [({"loss": 1.0, "accuracy": 0.5}, 1.0), ({"loss": 3.0}, 3.0), ({"rare": 9.0}, 0.0)]
    assert mean_metrics(reports) == {"accuracy": 0.5, "loss": 2.5}
    assert mean_metrics([]) == {}

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.aggregation.mean import TensorMean
from fedgrpc.aggregation.scaling import accumulated_steps, nova_scales, staleness_scale

STEPS = st.integers(1, 50)


def _gradient_coefficients(steps: int, momentum: float, proximal: float) -> list[float]:
    """By how much each local gradient moves the weights: run the optimizer on one gradient at a time."""
    coefficients = []
    for pulse in range(steps):
        w, velocity = 0.0, 0.0
        for step in range(steps):
            gradient = 1.0 if step == pulse else 0.0
            velocity = momentum * velocity + gradient
            w = w - velocity - proximal * w
        coefficients.append(-w)
    return coefficients


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_momentum_accumulates_as_its_recursion_does(steps: int, momentum: float) -> None:
    assert accumulated_steps(steps, momentum) == pytest.approx(sum(_gradient_coefficients(steps, momentum, 0.0)))


@pytest.mark.parametrize("proximal", [0.01, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_the_proximal_term_accumulates_as_its_recursion_does(steps: int, proximal: float) -> None:
    accumulated = accumulated_steps(steps, proximal=proximal)
    assert accumulated == pytest.approx(sum(_gradient_coefficients(steps, 0.0, proximal)))


@pytest.mark.parametrize("settings", [(0, 0.0, 0.0), (1, 1.0, 0.0), (1, -0.1, 0.0), (1, 0.0, 1.0), (1, 0.5, 0.5)])
def test_work_that_cannot_be_counted_is_refused(settings: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="steps"):
        accumulated_steps(*settings)


@given(steps=STEPS, weights=st.lists(st.floats(0.1, 1e6), min_size=1, max_size=8))
def test_updates_of_equal_work_keep_their_length_to_the_last_bit(steps: int, weights: list[float]) -> None:
    assert nova_scales(weights, [accumulated_steps(steps)] * len(weights)) == [1.0] * len(weights)


@given(st.lists(st.tuples(st.floats(0.1, 1e3), STEPS), min_size=1, max_size=8))
def test_every_step_counts_alike_and_the_mean_keeps_its_length(updates: list[tuple[float, int]]) -> None:
    """If each local gradient is 1, worker k moves by tau_k, and the normalized mean by tau_eff."""
    weights, steps = zip(*updates, strict=True)
    scales = nova_scales(weights, [float(count) for count in steps])
    moves = [scale * count for scale, count in zip(scales, steps, strict=True)]
    effective = np.average(steps, weights=weights)
    np.testing.assert_allclose(moves, effective, rtol=1e-9)


@pytest.mark.parametrize(("weights", "steps"), [([0.0], [1.0]), ([], []), ([1.0, 1.0], [1.0, 0.0])])
def test_updates_without_weight_or_work_are_refused(weights: list[float], steps: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weight and work"):
        nova_scales(weights, steps)


def _fixed_point(steps: list[int], optima: list[float], normalized: bool) -> float:
    """Where rounds of local gradient descent on (w - optimum)^2 / 2 end up, with equal weights."""
    w, rate = 0.0, 0.01
    weights = [1.0] * len(steps)
    scales = nova_scales(weights, [accumulated_steps(count) for count in steps]) if normalized else weights
    for _ in range(3000):
        mean = TensorMean(())
        for count, optimum, scale in zip(steps, optima, scales, strict=True):
            local = optimum + (1 - rate) ** count * (w - optimum)
            mean.add(np.array(local - w), 1.0, scale=scale)
        w += float(mean.result())
    return w


def test_normalizing_finds_the_optimum_that_plain_averaging_misses() -> None:
    """With unequal local steps, FedAvg minimizes another objective than the one asked for."""
    steps, optima = [1, 10, 40], [0.0, 3.0, 9.0]
    wanted = float(np.mean(optima))
    assert abs(_fixed_point(steps, optima, normalized=False) - wanted) > 2
    assert abs(_fixed_point(steps, optima, normalized=True) - wanted) < 0.5


def test_a_fresh_update_counts_in_full_and_a_stale_one_by_the_root_of_its_age() -> None:
    assert staleness_scale(0) == 1.0
    assert staleness_scale(3) == 0.5
    assert staleness_scale(3, exponent=0.0) == 1.0
    assert staleness_scale(1, exponent=1.0) == 0.5


@given(st.integers(0, 1000), st.floats(0, 3))
def test_an_older_update_never_counts_more(staleness: int, exponent: float) -> None:
    assert 0 <= staleness_scale(staleness + 1, exponent) <= staleness_scale(staleness, exponent) <= 1


@pytest.mark.parametrize(("staleness", "exponent"), [(-1, 0.5), (0, -0.5)])
def test_an_update_from_the_future_is_refused(staleness: int, exponent: float) -> None:
    with pytest.raises(ValueError, match="staleness"):
        staleness_scale(staleness, exponent)


def test_a_buffer_of_stale_updates_is_fedbuff_s_server_step() -> None:
    """w + 1/K sum_k (1 + staleness_k)^-1/2 delta_k (arXiv 2106.06639)."""
    deltas, ages = [4.0, -2.0, 6.0], [0, 3, 8]
    mean = TensorMean(())
    for delta, age in zip(deltas, ages, strict=True):
        mean.add(np.array(delta), 1.0, scale=staleness_scale(age))
    assert float(mean.result()) == pytest.approx((4.0 - 2.0 / 2 + 6.0 / 3) / 3)

"""A worker's weight in a coordinate falls with the noise that its number format adds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fedgrpc.aggregation.inverse_variance import inverse_variance_weight, rounding_noise
from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.submodels.coverage import Coverage
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, Pruning, Quantization

RNG = np.random.default_rng(5)
WEIGHTS = RNG.normal(scale=0.1, size=(64, 100))


def arithmetic(name: str) -> LocalModelPlan:
    return LocalModelPlan(arithmetic=Arithmetic(name, "stochastic"))


@pytest.mark.parametrize("plan", [LocalModelPlan(0.5), arithmetic("float32"), LocalModelPlan(pruning=Pruning())])
def test_full_precision_adds_no_noise(plan: LocalModelPlan) -> None:
    assert rounding_noise(plan, "w", WEIGHTS, steps=10) is None


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
def test_noise_of_one_step_is_what_rounding_the_weights_once_does(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, np.float16))
    rounded = WEIGHTS.astype(np.float32).astype(dtype).astype(np.float64)
    noise = rounding_noise(arithmetic(name), "w", WEIGHTS, steps=1)
    assert noise is not None
    assert noise.mean() == pytest.approx(np.mean((rounded - WEIGHTS) ** 2), rel=0.1)


def test_noise_of_fixed_point_and_of_few_bits_is_that_of_their_grids() -> None:
    fixed = rounding_noise(arithmetic("fixed16.10"), "w", WEIGHTS, steps=3)
    assert fixed == pytest.approx(np.full(WEIGHTS.shape, 3 * 2.0**-20 / 12))
    few = rounding_noise(LocalModelPlan(quantization=Quantization(4)), "w", WEIGHTS, steps=9)
    step = np.abs(WEIGHTS).max(axis=1, keepdims=True) / 7
    assert few == pytest.approx(np.broadcast_to(step**2 / 12, WEIGHTS.shape))
    assert rounding_noise(LocalModelPlan(quantization=Quantization(4)), "b", WEIGHTS[0], steps=9) is None
    pruned = rounding_noise(LocalModelPlan(quantization=Quantization(4)), "w", WEIGHTS[0], steps=9, axes=2)
    assert pruned is not None


def test_a_format_of_as_many_bits_is_the_same_by_any_name() -> None:
    named = rounding_noise(arithmetic("bfloat16"), "w", WEIGHTS, 4)
    assert named == pytest.approx(rounding_noise(arithmetic("e8s8"), "w", WEIGHTS, 4))


def test_weighing_by_precision_comes_closer_to_the_truth_than_weighing_all_alike() -> None:
    """Three workers know the step with float32's precision, three with float8's, from as many examples."""
    truth = RNG.normal(scale=0.01, size=WEIGHTS.shape)
    noise = rounding_noise(arithmetic("float8_e5m2"), "w", WEIGHTS, steps=20)
    assert noise is not None
    plain, precise = CoordinateMean(WEIGHTS.shape), CoordinateMean(WEIGHTS.shape)
    for worker in range(6):
        delta = truth + RNG.normal(scale=0.005, size=truth.shape)
        if worker < 3:
            plain.add(delta, 100.0)
            precise.add(delta, 100.0)
        else:
            delta = delta + RNG.normal(size=truth.shape) * np.sqrt(noise)
            plain.add(delta, 100.0)
            precise.add_each(delta, 100.0 * inverse_variance_weight(noise, delta), Coverage(WEIGHTS.shape))
    errors = [np.mean((mean.result() - truth) ** 2) for mean in (plain, precise)]
    assert errors[1] < errors[0] / 2


def test_the_say_is_from_above_nothing_to_all() -> None:
    delta = RNG.normal(scale=1e-3, size=WEIGHTS.shape)
    for variance in (1e-12, 1e-6, 1.0):
        weights = inverse_variance_weight(np.full(WEIGHTS.shape, variance), delta)
        assert ((weights > 0) & (weights <= 1)).all()
    assert (inverse_variance_weight(np.full(3, 1e-3), np.zeros(3)) == 1).all()

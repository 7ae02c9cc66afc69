"""An update's say falls with its noise, so that one noisy device costs the mean next to nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc import claims
from fedgrpc.aggregation.noise import say

RATIOS = st.floats(0.0, claims.NOISE_RATIO.most)


def test_an_update_without_noise_keeps_its_whole_weight() -> None:
    assert say(0.0) == 1.0


@given(RATIOS, RATIOS)
def test_the_say_only_falls_and_never_becomes_nothing(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 < say(high) <= say(low) <= 1


@pytest.mark.parametrize("ratio", [0.3, 3.0, 60.0])
def test_no_other_weight_gives_a_better_mean_of_updates_around_a_common_one(ratio: float) -> None:
    """The dumb version: try many weights for the noisy one of six, and measure the error of the mean."""
    rng = np.random.default_rng(3)
    updates = rng.standard_normal((6, 200_000))
    updates[5] += np.sqrt(ratio) * rng.standard_normal(200_000)

    def error(weight: float) -> float:
        weights = np.array([1, 1, 1, 1, 1, weight])
        return float(np.square(weights @ updates / weights.sum()).mean())

    tried = [factor * say(ratio) for factor in (0.0, 0.5, 0.8, 1.25, 2.0)]
    assert error(say(ratio)) < min(map(error, tried))


@given(RATIOS, st.floats(0.1, 10.0))
def test_the_noise_that_a_device_adds_is_at_most_half_of_its_update_however_noisy_it_is(
    ratio: float, norm: float
) -> None:
    assert say(ratio) * np.sqrt(ratio) * norm <= 0.5 * norm * (1 + 1e-12)

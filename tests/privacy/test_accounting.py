"""Privacy losses against `dp-accounting`, brute force and closed forms."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.privacy.accounting import (
    ORDERS,
    BandedGaussian,
    Gaussian,
    PrivacyLoss,
    SampledGaussian,
    TreeGaussian,
    least_multiplier,
)

dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (an extra of the tests)")
from dp_accounting.rdp import RdpAccountant  # noqa: E402

multipliers = st.floats(0.3, 50)
deltas = st.sampled_from([1e-2, 1e-5, 1e-9])


@given(multiplier=multipliers, delta=deltas)
def test_a_gaussian_costs_what_dp_accounting_says(multiplier: float, delta: float) -> None:
    theirs = dp.get_epsilon_gaussian(multiplier, delta)
    ours = PrivacyLoss((Gaussian(multiplier),)).epsilon(delta)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@given(multipliers=st.lists(multipliers, min_size=1, max_size=50), delta=deltas)
def test_a_row_of_gaussians_costs_as_one_of_their_joint_noise(multipliers: list[float], delta: float) -> None:
    joint = 1 / math.sqrt(sum(1 / multiplier**2 for multiplier in multipliers))
    theirs = dp.get_epsilon_gaussian(joint, delta)
    loss = PrivacyLoss(tuple(Gaussian(multiplier) for multiplier in multipliers))
    assert loss.epsilon(delta) == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3])
@pytest.mark.parametrize("multiplier", [0.7, 1.1, 8.0])
@pytest.mark.parametrize("rounds", [1, 300])
def test_sampled_rounds_cost_what_dp_accounting_says(multiplier: float, rate: float, rounds: int) -> None:
    accountant = RdpAccountant(orders=ORDERS)
    accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(multiplier)), rounds)
    loss = PrivacyLoss((SampledGaussian(multiplier, rate),) * rounds)
    assert loss.epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6, abs=1e-6)


def test_sampled_and_plain_rounds_add_up() -> None:
    accountant = RdpAccountant(orders=ORDERS)
    accountant.compose(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.5)), 40)
    accountant.compose(dp.GaussianDpEvent(6.0), 10)
    loss = PrivacyLoss((SampledGaussian(1.5, 0.1),) * 40 + (Gaussian(6.0),) * 10)
    assert loss.epsilon(1e-6) == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-6)


def test_a_sample_of_everybody_is_no_sample() -> None:
    loss, plain = PrivacyLoss((SampledGaussian(2.0, 1.0),)), PrivacyLoss((Gaussian(2.0),))
    assert loss.epsilon(1e-5) == plain.epsilon(1e-5)


@pytest.mark.parametrize("rounds", [1, 2, 7, 8, 100])
def test_a_tree_with_one_participation_costs_what_dp_accounting_says(rounds: int) -> None:
    accountant = RdpAccountant(orders=ORDERS, neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp.SingleEpochTreeAggregationDpEvent(3.0, rounds))
    tree = TreeGaussian(3.0, rounds, separation=rounds)
    renyi = min(
        tree.renyi(order) + math.log1p(-1 / order) - (math.log(1e-5) + math.log(order)) / (order - 1)
        for order in ORDERS
    )
    assert renyi == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    assert PrivacyLoss((tree,)).epsilon(1e-5) <= renyi


def _moved(rounds: int, participated: tuple[int, ...]) -> int:
    """Return the sum of squares by which the complete nodes move, counted node by node."""
    moved = 0
    size = 1
    while size <= rounds:
        for start in range(0, rounds - size + 1, size):
            moved += sum(start <= each < start + size for each in participated) ** 2
        size *= 2
    return moved


@pytest.mark.parametrize("rounds", range(1, 11))
@pytest.mark.parametrize("separation", [1, 2, 3, 4, 16])
def test_no_device_moves_a_tree_by_more_than_its_bound(rounds: int, separation: int) -> None:
    tree = TreeGaussian(1.0, rounds, separation)
    worst = max(
        _moved(rounds, participated)
        for k in range(1, tree.participations + 1)
        for participated in combinations(range(rounds), k)
        if all(b - a >= separation for a, b in pairwise(participated))
    )
    assert worst <= tree.sensitivity_squared
    if separation >= rounds or (separation == 1 and rounds & (rounds - 1) == 0):
        assert worst == tree.sensitivity_squared


@given(epsilon=st.floats(0.05, 20), rounds=st.integers(1, 1000))
def test_the_least_multiplier_keeps_the_target_and_wastes_nothing(epsilon: float, rounds: int) -> None:
    def planned(multiplier: float) -> PrivacyLoss:
        return PrivacyLoss((Gaussian(multiplier / math.sqrt(rounds)),))

    multiplier = least_multiplier(epsilon, 1e-5, planned)
    assert planned(multiplier).epsilon(1e-5) <= epsilon
    assert planned(multiplier * 0.999).epsilon(1e-5) > epsilon


def test_more_releases_never_cost_less() -> None:
    losses = [PrivacyLoss((Gaussian(4.0),) * n).epsilon(1e-5) for n in range(30)]
    assert losses == sorted(losses)
    assert losses[0] == 0


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_none_is_refused(wrong: float) -> None:
    for mechanism, *rest in ((Gaussian,), (SampledGaussian, 0.5), (TreeGaussian, 1, 1), (BandedGaussian, 1, 1, 1)):
        with pytest.raises(ValueError, match="noise multiplier"):
            mechanism(wrong, *rest)

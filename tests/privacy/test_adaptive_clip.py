"""A clip norm that follows a quantile: its cost, its steps, and where it ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.privacy.accounting import ORDERS, Gaussian, PrivacyLoss, SampledGaussian
from fedgrpc.privacy.adaptive_clip import count_deviation, next_clip_norm, update_multiplier
from fedgrpc.privacy.ledger import Ledger, ReleaseRules
from fedgrpc.privacy.noise import RoundNoise

multipliers = st.floats(0.05, 50)
cohorts = st.integers(1, 100_000)
KEY = bytes(range(32))
RULES = ReleaseRules("gaussian", 1.0, 0.1, 100, clip_quantile=0.5)


@given(multiplier=multipliers, cohort=cohorts)
def test_update_and_count_together_cost_what_the_multiplier_says(multiplier: float, cohort: int) -> None:
    both = update_multiplier(multiplier, cohort), 2 * count_deviation(multiplier, cohort)
    # "z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)", arXiv 1905.03871, section 3.1.
    assert both[0] == pytest.approx((multiplier**-2 - both[1] ** -2) ** -0.5)
    assert math.fsum(each**-2 for each in both) == pytest.approx(multiplier**-2, rel=1e-9)
    assert multiplier < both[0] <= 2 / math.sqrt(3) * multiplier * (1 + 1e-9)


@pytest.mark.parametrize("rate", [None, 0.1])
def test_the_ledger_counts_both_releases_as_dp_accounting_does(rate: float | None) -> None:
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (an extra of the tests)")
    from dp_accounting.rdp import RdpAccountant

    ledger = Ledger(replace(RULES, rate=rate), 1e-5)
    ours = ledger.epsilon(more=30)
    both = dp.ComposedDpEvent(
        [dp.GaussianDpEvent(update_multiplier(1.0, 100)), dp.GaussianDpEvent(2 * count_deviation(1.0, 100))]
    )
    if rate is None:
        joint = 1 / math.sqrt(30 * sum(event.noise_multiplier**-2 for event in both.events))
        assert ours == pytest.approx(dp.get_epsilon_gaussian(joint, 1e-5), rel=1e-6)
        assert ours == pytest.approx(PrivacyLoss((Gaussian(1.0),) * 30).epsilon(1e-5), rel=1e-9)
        return
    accountant = RdpAccountant(orders=ORDERS)
    accountant.compose(dp.PoissonSampledDpEvent(rate, both), 30)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    assert ours == pytest.approx(PrivacyLoss((SampledGaussian(1.0, rate),) * 30).epsilon(1e-5), rel=1e-9)


def test_the_noise_of_a_version_is_that_of_what_the_count_leaves() -> None:
    assert RULES.deviation == pytest.approx(update_multiplier(1.0, 100) * 0.1 / 100)
    assert RULES.deviation > replace(RULES, clip_quantile=None).deviation


def test_a_step_is_that_of_the_paper() -> None:
    # 70 of 100 fit where half should: C <- C exp(-0.2 (0.7 - 0.5)).
    assert next_clip_norm(2.0, 0.5, 70, 100, 0.0, 100) == pytest.approx(2.0 * math.exp(-0.04))
    assert next_clip_norm(2.0, 0.7, 70, 100, 0.0, 100) == pytest.approx(2.0)
    # Nobody came: nothing is known, and the share is a half.
    assert next_clip_norm(2.0, 0.5, 0, 0, 0.0, 100) == 2.0


@given(st.floats(-1e6, 1e6), st.integers(0, 100), st.floats(0.01, 0.99))
def test_no_draw_moves_the_clip_norm_by_more_than_a_fifth(noise: float, fits: int, quantile: float) -> None:
    assert math.exp(-0.2) <= next_clip_norm(1.0, quantile, fits, 100, noise, 100) <= math.exp(0.2)


@pytest.mark.parametrize("first", [1e-3, 100.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_norm_ends_near_the_quantile_wherever_it_begins(first: float, quantile: float) -> None:
    rng, ledger, found = (
        np.random.default_rng(1),
        Ledger(replace(RULES, clip_norm=first, clip_quantile=quantile), 1e-5),
        [],
    )
    for number in range(1, 501):
        clip_norm = ledger.rules_of(number).clip_norm
        norms = rng.lognormal(0.0, 0.5, 100)
        release = ledger.release_of(number, number, [str(each) for each in range(100)])
        ledger = ledger.entered(release.adapted(int((norms <= clip_norm).sum()), RoundNoise(KEY, release.step)))
        found.append(clip_norm)
    true = np.quantile(np.random.default_rng(2).lognormal(0.0, 0.5, 100_000), quantile)
    assert np.exp(np.mean(np.log(found[-200:]))) == pytest.approx(true, rel=0.1)


def test_a_second_release_of_a_round_has_its_clip_norm_and_the_next_round_what_follows() -> None:
    ledger = Ledger(RULES, 1e-5)
    first = ledger.release_of(1, 2, ["a", "b"]).adapted(2, RoundNoise(KEY, 1))
    ledger = ledger.entered(first)
    # Its devices were told 0.1, whatever a first commit that was cut off has entered.
    again = ledger.release_of(1, 2, ["a"]).adapted(0, RoundNoise(KEY, 2))
    assert again.rules.clip_norm == first.rules.clip_norm == 0.1
    ledger = ledger.entered(again)
    assert ledger.release_of(1, 2, ["b", "a"]) == first
    assert ledger.rules_of(2).clip_norm == again.next_clip_norm != first.next_clip_norm


def test_the_same_release_computed_again_has_the_same_next_clip_norm() -> None:
    release = Ledger(RULES, 1e-5).release_of(1, 2, ["a", "b"])
    once, twice, other = (release.adapted(1, RoundNoise(KEY, step)) for step in (1, 1, 2))
    assert once == twice
    assert once.next_clip_norm != other.next_clip_norm


def test_the_noise_of_counts_is_normal_and_apart_from_that_of_tensors() -> None:
    drawn = np.array([RoundNoise(KEY, step).of_count() for step in range(1, 2001)])
    assert abs(drawn.mean()) < 0.1
    assert drawn.std() == pytest.approx(1.0, abs=0.05)
    of_tensors = [RoundNoise(KEY, step).normals(name, 1)[0] for step in range(1, 50) for name in ("", "count")]
    assert not set(of_tensors) & set(drawn)


def test_without_a_quantile_the_clip_norm_stays() -> None:
    ledger = Ledger(replace(RULES, clip_quantile=None), 1e-5)
    for number in range(1, 4):
        release = ledger.release_of(number, number, ["a"])
        assert release.adapted(0, RoundNoise(KEY, number)) == release
        ledger = ledger.entered(release)
    assert ledger.rules.clip_norm == 0.1

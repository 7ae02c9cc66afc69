"""Banded noise against dense matrices: what it adds, how it cancels out, and what it costs."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.privacy.accounting import BandedGaussian, Gaussian, PrivacyLoss, TreeGaussian, least_multiplier
from fedgrpc.privacy.banded import coefficients, sensitivity_squared
from fedgrpc.privacy.ledger import ReleaseRules, loss_of
from fedgrpc.privacy.noise import RoundNoise

KEY = bytes(range(32))


def inverse(rounds: int, bands: int) -> np.ndarray:
    """C^-1 as a matrix."""
    found = np.zeros((rounds, rounds))
    for j, value in enumerate(coefficients(min(bands, rounds))):
        found += value * np.eye(rounds, k=-j)
    return found


def spaced(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """All rounds in which one device may take part."""
    every = (each for k in range(1, rounds + 1) for each in combinations(range(rounds), k))
    return [each for each in every if all(after - before >= separation for before, after in pairwise(each))]


@pytest.mark.parametrize("bands", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("separation", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("rounds", [1, 2, 5, 10])
def test_the_sensitivity_is_that_of_the_worst_participation_in_the_dense_matrix(
    rounds: int, separation: int, bands: int
) -> None:
    c = np.linalg.inv(inverse(rounds, bands))
    worst = max(float((c[:, each].sum(axis=1) ** 2).sum()) for each in map(list, spaced(rounds, separation)))
    assert sensitivity_squared(rounds, separation, bands) == pytest.approx(worst, rel=1e-9)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 12), st.integers(0, 1 << 31), st.data())
def test_no_device_moves_the_releases_further_whatever_it_sends(
    rounds: int, separation: int, bands: int, seed: int, data: st.DataObject
) -> None:
    took_part = list(data.draw(st.sampled_from(spaced(rounds, separation))))
    sent = np.zeros((rounds, 3))
    sent[took_part] = np.random.default_rng(seed).normal(size=(len(took_part), 3))
    sent[took_part] /= np.linalg.norm(sent[took_part], axis=1, keepdims=True)
    moved = np.linalg.inv(inverse(rounds, bands)) @ sent
    assert (moved**2).sum() <= sensitivity_squared(rounds, separation, bands) * (1 + 1e-9)


@pytest.mark.parametrize("bands", [1, 2, 7, 64])
def test_columns_fall_and_are_above_zero_which_the_proof_rests_on(bands: int) -> None:
    column = np.linalg.inv(inverse(200, bands))[:, 0]
    assert (column >= 0).all()
    assert (np.diff(column) <= 1e-15).all()


def test_all_bands_are_the_square_root_of_the_sum() -> None:
    root = np.linalg.inv(inverse(50, 50))
    np.testing.assert_allclose(root @ root, np.tril(np.ones((50, 50))), atol=1e-12)


@pytest.mark.parametrize("bands", [1, 3, 10])
def test_the_noise_of_the_sums_is_that_of_the_dense_matrix(bands: int) -> None:
    rounds = 8
    z = np.stack([RoundNoise(KEY, step).normals("w", 50) for step in range(1, rounds + 1)])
    added = np.stack([RoundNoise(KEY, step, bands=bands).normals("w", 50) for step in range(1, rounds + 1)])
    np.testing.assert_allclose(added, inverse(rounds, bands) @ z, atol=1e-12)


def test_noise_from_an_element_on_is_that_of_the_whole_tensor() -> None:
    whole = RoundNoise(KEY, 5, bands=3).normals("w", 64)
    np.testing.assert_array_equal(RoundNoise(KEY, 5, bands=3).normals("w", 40, 24), whole[24:])


@pytest.mark.parametrize(("rounds", "separation"), [(1, 4), (20, 4), (300, 10), (1000, 100)])
def test_a_run_costs_what_dp_accounting_says_of_its_dense_matrix(rounds: int, separation: int) -> None:
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (an extra of the tests)")
    rules = ReleaseRules("dp-mf", 3.0, 1.0, 10, separation, bands=separation)
    c = np.linalg.inv(inverse(rounds, separation))
    theirs = dp.get_epsilon_gaussian(3.0 / np.linalg.norm(c[:, ::separation].sum(axis=1)), 1e-5)
    assert loss_of([rules] * rounds).epsilon(1e-5) == pytest.approx(theirs, rel=1e-6)


def test_one_band_is_independent_noise() -> None:
    np.testing.assert_array_equal(RoundNoise(KEY, 3, bands=1).normals("w", 9), RoundNoise(KEY, 3).normals("w", 9))
    one = PrivacyLoss((BandedGaussian(2.0, 10, 4, 1),)).epsilon(1e-5)
    assert one == pytest.approx(PrivacyLoss((Gaussian(2.0),) * 3).epsilon(1e-5))


@pytest.mark.parametrize(("rounds", "separation"), [(20, 10), (200, 10), (200, 50), (1000, 100)])
def test_for_the_same_epsilon_the_last_version_has_half_the_noise_of_a_trees(rounds: int, separation: int) -> None:
    banded = least_multiplier(
        2.0, 1e-5, lambda z: PrivacyLoss((BandedGaussian(z, rounds, separation, separation),))
    )
    tree = least_multiplier(2.0, 1e-5, lambda z: PrivacyLoss((TreeGaussian(z, rounds, separation),)))
    carried = inverse(rounds, separation).sum(axis=0)
    assert banded * np.linalg.norm(carried) < 0.65 * tree * math.sqrt(rounds.bit_count())

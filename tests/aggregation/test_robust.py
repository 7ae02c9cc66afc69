"""Every rule against a naive version of its paper, and what an attacker can do to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.aggregation.robust.aggregation import RULES, aggregation_of
from fedgrpc.aggregation.robust.krum import scores
from fedgrpc.aggregation.robust.nnm import mixing
from fedgrpc.errors import UsageError

TEXTS = [
    *("median", "trimmed-mean:0.2", "geometric-median", "krum:f=1", "multi-krum:f=1", "centered-clip"),
    *("nnm+median", "nnm:f=1+trimmed-mean:0.2", "nnm+krum:f=1", "nnm+geometric-median"),
]


def updates(seed, n=9, m=12):
    return np.random.default_rng(seed).normal(0, 1, (n, m))


def aggregated(text, given):
    """What a rule makes of whole updates [n, m]."""
    verdict = aggregation_of(text).judge(given @ given.T)
    return verdict.combine(given) if verdict.combine else verdict.shares @ given


def naive_median(given):
    return np.array([np.median(column[~np.isnan(column)]) for column in given.T])


def naive_trimmed(given, share=0.2):
    means = []
    for column in given.T:
        values = sorted(column[~np.isnan(column)])
        cut = int(share * len(values) + 1e-9)
        means.append(np.mean(values[cut : len(values) - cut]))
    return np.array(means)


def naive_scores(given, f):
    n = len(given)
    between = ((given[:, None] - given[None]) ** 2).sum(axis=2)
    return np.array([sum(sorted(np.delete(between[i], i))[: n - f - 2]) for i in range(n)])


def naive_mixed(given, f):
    n = len(given)
    near = [sorted(range(n), key=lambda j: ((given[i] - given[j]) ** 2).sum())[: n - f] for i in range(n)]
    return np.array([given[near[i]].mean(axis=0) for i in range(n)])


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_median_and_trimmed_mean_are_those_of_each_coordinate(seed, n):
    given_ = updates(seed, n)
    np.testing.assert_allclose(aggregated("median", given_), naive_median(given_), atol=1e-12)
    np.testing.assert_allclose(aggregated("trimmed-mean:0.2", given_), naive_trimmed(given_), atol=1e-12)


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_coordinates_are_combined_over_those_who_cover_them(seed, n):
    rng, given_ = np.random.default_rng(seed), updates(seed, n)
    given_[rng.random(given_.shape) < 0.4] = np.nan
    covered = ~np.isnan(given_).all(axis=0)
    for text, naive in (("median", naive_median), ("trimmed-mean:0.2", naive_trimmed)):
        combined = aggregation_of(text).rule.combine(given_)
        assert np.array_equal(np.isnan(combined), ~covered)
        np.testing.assert_allclose(combined[covered], naive(given_[:, covered]), atol=1e-12)


@given(st.integers(0, 2**31), st.integers(5, 12))
def test_krum_chooses_by_the_papers_score(seed, n):
    given_ = updates(seed, n)
    np.testing.assert_allclose(scores(given_ @ given_.T, 1), naive_scores(given_, 1), rtol=1e-9)
    best = np.argsort(naive_scores(given_, 1), kind="stable")
    np.testing.assert_allclose(aggregated("krum:f=1", given_), given_[best[0]], atol=1e-12)
    np.testing.assert_allclose(
        aggregated("multi-krum:f=1", given_), given_[best[: n - 1]].mean(axis=0), atol=1e-12
    )


@given(st.integers(0, 2**31), st.integers(3, 12))
def test_no_point_near_the_geometric_median_has_a_smaller_sum_of_distances(seed, n):
    given_ = updates(seed, n)
    found = aggregated("geometric-median", given_)

    def total(point):
        return np.linalg.norm(given_ - point, axis=1).sum()

    rng = np.random.default_rng(seed)
    others = found + 0.01 * rng.normal(0, 1, (50, given_.shape[1]))
    assert total(found) <= min(map(total, others)) + 1e-6


def test_centered_clip_is_the_papers_iteration_from_the_geometric_median():
    given_ = updates(3)
    v = aggregated("geometric-median", given_)
    for _ in range(3):
        steps = given_ - v
        norms = np.linalg.norm(steps, axis=1, keepdims=True)
        v = v + (steps * np.minimum(1, 2.5 / norms)).mean(axis=0)
    np.testing.assert_allclose(aggregated("centered-clip:radius=2.5", given_), v, atol=1e-9)


@given(st.integers(0, 2**31), st.integers(4, 12))
def test_mixing_is_the_mean_of_the_nearest(seed, n):
    given_ = updates(seed, n)
    mixed = naive_mixed(given_, 1)
    np.testing.assert_allclose(mixing(given_ @ given_.T, 1) @ given_, mixed, atol=1e-12)
    np.testing.assert_allclose(aggregated("nnm:f=1+median", given_), naive_median(mixed), atol=1e-12)
    if n >= 5:
        # Mixed updates may be equal, so that several have the best score.
        chosen = np.linalg.norm(mixed - aggregated("nnm+krum:f=1", given_), axis=1).argmin()
        own = naive_scores(mixed, 1)
        assert own[chosen] <= own.min() + 1e-9


@pytest.mark.parametrize("text", TEXTS)
def test_updates_that_agree_are_kept(text):
    same = np.tile(updates(1, 1), (9, 1))
    np.testing.assert_allclose(aggregated(text, same), same[0], atol=1e-9)


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "nnm+krum:f=1"])
@given(seed=st.integers(0, 2**31))
def test_the_order_of_updates_does_not_matter(text, seed):
    given_ = updates(seed)
    shuffled = np.random.default_rng(seed).permutation(given_)
    np.testing.assert_allclose(aggregated(text, given_), aggregated(text, shuffled), atol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_one_attacker_of_nine_moves_no_rule_far_and_the_mean_as_far_as_it_likes(text, size):
    honest = updates(5, 8)
    attacked = np.vstack([honest, np.full((1, 12), size)])
    assert np.linalg.norm(attacked.mean(axis=0)) > size / 10
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(aggregated(text, attacked) - honest.mean(axis=0)) < 1.5 * spread


def test_the_attacker_has_the_largest_distance():
    attacked = np.vstack([updates(5, 8), np.full((1, 12), 50.0)])
    distances = aggregation_of("median").judge(attacked @ attacked.T).distances
    assert distances.argmax() == 8
    assert distances[8] > 10 * np.median(distances)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("average", "known: median"),
        ("krum", "needs f"),
        ("krum:f=-1", "from 0"),
        ("trimmed-mean:0.5", "below 0.5"),
        ("median+krum:f=1", "no aggregation 'median'"),
        ("nnm+mean", "known: median"),
        ("fedgrpc.training_plan:TrainingPlan", "no combine"),
        ("no_such_rules:Rule", "PYTHONPATH"),
    ],
)
def test_a_text_that_names_no_rule_is_refused_in_one_line(text, words):
    with pytest.raises(UsageError, match=words) as refused:
        aggregation_of(text)
    assert "\n" not in str(refused.value)


def test_every_rule_is_tried_here():
    assert RULES.keys() <= {text.partition("+")[2].partition(":")[0] or text.partition(":")[0] for text in TEXTS}

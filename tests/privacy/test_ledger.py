"""The ledger: entries, what they cost, and what it refuses."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UpdateRefused, UsageError
from fedgrpc.privacy.accounting import Gaussian, PrivacyLoss, SampledGaussian, TreeGaussian
from fedgrpc.privacy.ledger import Ledger, ReleaseRules, ledger_of, loss_of
from fedgrpc.privacy.policy import PrivacyPolicy

RULES = ReleaseRules("gaussian", 2.0, 1.0, 10)
LEDGER = Ledger(RULES, 1e-5)


def after(ledger, rounds):
    for number in range(1, rounds + 1):
        ledger = ledger.entered(ledger.release_of(number, number, [f"token{number}"]))
    return ledger


def test_the_same_sum_is_one_release_and_another_sum_of_its_round_is_a_second():
    ledger = LEDGER.entered(first := LEDGER.release_of(7, 3, ["a", "b"]))
    assert ledger.release_of(7, 3, ["b", "a"]) == first
    again = ledger.entered(ledger.release_of(7, 3, ["a"]))
    assert again.release_of(7, 3, ["a", "b"]) == first
    assert ledger.release_of(7, 3, ["a"]).step == 2
    assert ledger.release_of(8, 3, ["a", "b"]).step == 2


def test_the_same_sum_over_another_cohort_is_another_release():
    """The aggregator restarts behind an entry with a smaller cohort: the noise entered is too little."""
    ledger = LEDGER.entered(first := LEDGER.release_of(7, 3, ["a", "b"]))
    smaller = replace(ledger, rules=replace(RULES, cohort=5))
    second = smaller.release_of(7, 3, ["a", "b"])
    assert (second.step, second.rules.deviation) == (2, 2 * first.rules.deviation)
    assert smaller.entered(second).release_of(7, 3, ["a", "b"]) == second


def test_entries_follow_each_other_without_a_gap():
    with pytest.raises(ValueError, match="cannot follow"):
        LEDGER.entered(replace(LEDGER.release_of(1, 1, []), step=2))


def test_noise_is_as_long_as_the_most_that_one_device_adds():
    assert ReleaseRules("gaussian", 2.0, 3.0, 12).deviation == 0.5


def test_a_ledger_costs_what_its_mechanisms_cost():
    assert after(LEDGER, 5).epsilon() == PrivacyLoss((Gaussian(2.0),) * 5).epsilon(1e-5)
    sampled = after(replace(LEDGER, rules=replace(RULES, rate=0.1)), 5)
    assert sampled.epsilon() == PrivacyLoss((SampledGaussian(2.0, 0.1),) * 5).epsilon(1e-5)
    tree = after(replace(LEDGER, rules=replace(RULES, mechanism="dp-ftrl", min_separation=3)), 5)
    assert tree.epsilon() == PrivacyLoss((TreeGaussian(2.0, 5, 3),)).epsilon(1e-5)
    assert after(LEDGER, 2).epsilon(more=3) == after(LEDGER, 5).epsilon()


@given(st.lists(st.floats(0.5, 4.0), max_size=9), st.integers(1, 4))
def test_independent_noise_costs_a_device_its_dearest_releases_that_are_far_enough_apart(multipliers, separation):
    rules = [replace(RULES, noise_multiplier=z, min_separation=separation) for z in multipliers]

    def spaced(indices):
        return all(later - earlier >= separation for earlier, later in itertools.pairwise(indices))

    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(multipliers)), size) for size in range(len(multipliers) + 1)
    )
    dearest = max(sum(multipliers[i] ** -2 for i in subset) for subset in subsets if spaced(subset))
    found = math.fsum(mechanism.noise_multiplier**-2 for mechanism in loss_of(rules).mechanisms)
    assert found == pytest.approx(dearest)


def test_a_device_rests_until_enough_versions_have_been_released():
    ledger = replace(LEDGER, rules=replace(RULES, min_separation=3)).chosen(["pi"])
    for step, resting in enumerate([True, True, True, False], start=1):
        assert ("pi" in ledger.resting) is resting, step
        ledger = ledger.entered(ledger.release_of(step, step, []))


def test_a_device_rests_from_the_last_release_of_its_round_if_that_was_entered_twice():
    """The second sum was released. Counted from the first, the device would be back one version too soon."""
    ledger = replace(LEDGER, rules=replace(RULES, min_separation=3)).chosen(["pi"])
    ledger = ledger.entered(ledger.release_of(1, 2, ["a", "b"]))
    ledger = ledger.entered(ledger.release_of(1, 2, ["a"]))
    for number, resting in ((2, True), (3, True), (4, False)):
        assert ("pi" in ledger.resting) is resting, number
        ledger = ledger.entered(ledger.release_of(number, number, []))


def test_without_a_separation_nobody_rests():
    assert not LEDGER.chosen(["pi"]).resting


def test_the_computed_noise_spends_the_target_and_no_more():
    policy = PrivacyPolicy("gaussian", target_epsilon=2.0, cohort=10)
    ledger = ledger_of(policy, 1.0, None, 20)
    assert ledger.epsilon(more=20) == pytest.approx(2.0, rel=1e-5)
    assert ledger.epsilon(more=20) <= 2.0
    full = after(ledger, 20)
    assert not full.affordable
    with pytest.raises(UpdateRefused, match=r"more than an epsilon of 2"):
        full.release_of(21, 21, [])


def test_rounds_added_later_get_the_noise_that_still_keeps_to_the_target():
    policy = PrivacyPolicy("gaussian", target_epsilon=2.0, cohort=10)
    former = after(ledger_of(policy, 1.0, None, 20), 10)
    longer = ledger_of(policy, 1.0, None, 40, former.releases)
    assert longer.rules.noise_multiplier > former.rules.noise_multiplier
    assert longer.epsilon(more=40) == pytest.approx(2.0, rel=1e-5)


def test_a_tree_keeps_the_noise_with_which_it_began():
    policy = PrivacyPolicy("dp-ftrl", target_epsilon=2.0, cohort=10, min_separation=4)
    former = after(ledger_of(policy, 1.0, None, 20), 10)
    assert ledger_of(policy, 1.0, None, 30, former.releases).rules == former.rules
    with pytest.raises(UsageError, match="clip_norm"):
        ledger_of(policy, 2.0, None, 10, former.releases)


def test_banded_noise_is_of_as_many_rounds_as_devices_rest_up_to_a_bound_and_stays():
    policy = PrivacyPolicy("dp-mf", target_epsilon=2.0, cohort=10, min_separation=4)
    ledger = ledger_of(policy, 1.0, None, 20)
    assert (ledger.rules.bands, ledger.epsilon(more=20)) == (4, pytest.approx(2.0, rel=1e-5))
    former = after(ledger, 10)
    assert former.epsilon(more=10) == ledger.epsilon(more=20)
    assert ledger_of(policy, 1.0, None, 30, former.releases).rules == former.rules
    assert ledger_of(replace(policy, min_separation=1000), 1.0, None, 20).rules.bands == 64


@pytest.mark.parametrize(
    "changed", [{"mechanism": "dp-ftrl"}, {"min_separation": 2}], ids=["mechanism", "min_separation"]
)
def test_what_the_loss_rests_on_does_not_change_within_a_run(changed):
    policy = PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=10)
    former = after(ledger_of(policy, 1.0, None, None), 2)
    ledger_of(replace(policy, noise_multiplier=3.0), 1.0, None, None, former.releases)
    with pytest.raises(UsageError, match="cannot become"):
        ledger_of(replace(policy, **changed), 1.0, None, None, former.releases)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mechanism": "laplace"}, "gaussian"),
        ({"mechanism": "gaussian", "cohort": 5}, "either noise_multiplier or target_epsilon"),
        ({"mechanism": "gaussian", "noise_multiplier": 1.0}, "privacy_cohort"),
        ({"mechanism": "dp-mf", "noise_multiplier": 1.0, "cohort": 5}, "min_separation"),
        ({"mechanism": "gaussian", "noise_multiplier": math.inf, "cohort": 5}, "noise_multiplier"),
        ({"noise_multiplier": 1.0}, "go with privacy"),
        ({"delta": 1.0}, "delta"),
        ({"min_separation": 0}, "min_separation"),
    ],
)
def test_a_policy_that_says_too_little_is_refused(values, words):
    with pytest.raises(UsageError, match=words):
        PrivacyPolicy(**values)

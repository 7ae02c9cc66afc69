"""Conditions on scores: reading them, and what many reports say of one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.runs.conditions import Condition, Verdict, judge

ACCURATE = Condition("accuracy", 0.9)
CHEAP = Condition("loss", 0.5, at_least=False)


def accuracies(*values):
    return [{"accuracy": value} for value in values]


def test_a_condition_is_read_and_shown_alike():
    assert Condition.parse(" accuracy >= 0.9") == ACCURATE
    assert Condition.parse("loss<=0.5") == CHEAP
    assert Condition.parse(" loss <= 1e-3 ") == Condition("loss", 0.001, at_least=False)
    assert Condition.parse("top-5>=90") == Condition("top-5", 90.0)
    assert (str(ACCURATE), str(CHEAP)) == ("accuracy>=0.9", "loss<=0.5")


@pytest.mark.parametrize(
    "text",
    [
        *("", "accuracy", "accuracy>0.9", "accuracy=0.9", "accuracy>=", "accuracy>=high", ">=0.9"),
        *("a>=nan", "a>=inf", "a<=inf", "a>=0.9>=1", "x" * 65 + ">=1"),
    ],
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"looks like accuracy>=0.95 or loss<=0.1"):
        Condition.parse(text)


def test_a_condition_is_met_from_its_value_on():
    assert [ACCURATE.met(score) for score in (0.89, 0.9, 1.0, math.nan)] == [False, True, True, False]
    assert [CHEAP.met(score) for score in (0.51, 0.5, 0.0, math.nan)] == [False, True, True, False]


def test_nothing_is_decided_before_a_quorum_has_reported():
    assert judge([ACCURATE], accuracies(0.95), 0, 2).verdict is Verdict.UNDECIDED
    assert judge([ACCURATE], accuracies(0.95, 0.91), 0, 2).verdict is Verdict.GOOD


def test_devices_without_the_score_do_not_count_for_it():
    judgement = judge([ACCURATE], [{}, {"loss": 1.0}, {"accuracy": 0.99}], 0, 2)
    assert judgement.verdict is Verdict.UNDECIDED
    assert "accuracy" in judgement.reason


def test_of_two_middle_scores_the_worse_decides():
    assert judge([ACCURATE], accuracies(0.8, 0.95), 0, 2).verdict is Verdict.BAD
    assert judge([CHEAP], [{"loss": 0.4}, {"loss": 0.6}], 0, 2).verdict is Verdict.BAD


def test_a_device_that_cannot_use_the_model_has_the_worst_score():
    assert judge([ACCURATE], accuracies(0.95), 2, 2).verdict is Verdict.BAD
    assert judge([ACCURATE], accuracies(0.95, 0.95), 1, 2).verdict is Verdict.GOOD


def test_without_conditions_most_devices_have_to_be_able_to_use_it():
    assert judge([], [{}, {}], 1, 2).verdict is Verdict.GOOD
    assert judge([], [{}], 2, 2).verdict is Verdict.BAD
    assert judge([], [{}], 0, 2).verdict is Verdict.UNDECIDED


@given(
    honest=st.lists(st.floats(0.9, 1.0), min_size=2, max_size=9),
    lies=st.lists(st.floats(-1e30, 1e30), max_size=8),
)
def test_a_minority_decides_nothing_whatever_it_claims(honest, lies):
    lies = lies[: len(honest) - 1]
    values = [*honest, *lies]
    quorum = len(values) // 2 + 1
    assert judge([ACCURATE], accuracies(*values), 0, quorum).verdict is Verdict.GOOD
    bad = [value - 0.9 for value in honest]
    assert judge([ACCURATE], accuracies(*bad, *lies), 0, quorum).verdict is Verdict.BAD


def test_nan_meets_no_condition():
    assert not ACCURATE.met(math.nan)
    assert not CHEAP.met(math.nan)


def test_a_long_text_is_refused_at_once():
    # Its blanks would take the pattern hours.
    with pytest.raises(UsageError, match="looks like"):
        Condition.parse("a" + " " * 100_000)

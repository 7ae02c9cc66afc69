"""Which version of a run is kept as the best."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rounds.version import ACCURACY, LOSS, Candidate, Jump, Measure, best_of, norm_jumps, score_jumps


def scored(version, value, name="accuracy", jump=Jump.NONE):
    return Candidate(version, {name: value}, jump)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([], None),
        ([Candidate(1), Candidate(3), Candidate(2)], 3),
        ([scored(1, 0.5), scored(2, 0.9), scored(3, 0.7)], 2),
        ([scored(1, 0.5), scored(2, 0.9), scored(3, 0.9)], 3),
        ([scored(1, 0.5), Candidate(2)], 1),
        ([scored(1, 0.5, "loss"), scored(2, 0.2, "loss"), scored(3, 0.3, "loss")], 2),
        ([scored(1, 0.5), scored(2, 0.01, "loss")], 1),
        ([scored(1, 0.5), scored(2, 1.0, jump=Jump.NORM)], 1),
        ([scored(1, 0.5), scored(2, 0.2, jump=Jump.SCORES)], 1),
        ([Candidate(1), Candidate(2, {}, Jump.NORM)], 1),
        ([Candidate(2, {}, Jump.NORM)], None),
    ],
)
def test_the_best_version_is_the_last_of_those_with_the_best_score_that_did_not_jump(candidates, best):
    assert best_of(candidates) == best


def test_the_score_of_the_runs_target_comes_first():
    candidates = [Candidate(1, {"f1": 0.9, "accuracy": 0.1}), Candidate(2, {"f1": 0.1, "accuracy": 0.9})]
    assert best_of(candidates, (Measure("f1", True), ACCURACY, LOSS)) == 1
    assert best_of(candidates, (Measure("f1", False),)) == 2


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(list(Jump))), max_size=8))
def test_to_let_go_of_what_is_not_the_best_never_changes_which_one_is(versions):
    candidates = [scored(number, value, jump=jump) for number, (value, jump) in enumerate(versions, start=1)]
    kept: list[Candidate] = []
    for each in candidates:
        kept = [one for one in [*kept, each] if one is each or one.version == best_of([*kept, each])]
    assert best_of(kept) == best_of(candidates)


def test_a_norm_far_above_all_before_it_jumps():
    assert norm_jumps(1e30, 40.0, 2000)
    assert norm_jumps(float("inf"), 40.0, 2000)
    assert norm_jumps(float("nan"), 40.0, 2000)
    assert not norm_jumps(80.0, 40.0, 2000)
    assert not norm_jumps(80.0, 0.001, 2000), "values below 1 on average are no reason to worry"
    assert not norm_jumps(1e30, 0.0, 2000), "from nothing, everything is far"


@pytest.mark.parametrize(
    ("measure", "value", "best", "jumps"),
    [(ACCURACY, 0.4, 0.9, True), (ACCURACY, 0.6, 0.9, False), (LOSS, 0.9, 0.4, True), (LOSS, 0.5, 0.4, False)],
)
def test_a_score_far_worse_than_the_best_jumps(measure, value, best, jumps):
    assert score_jumps(measure, value, best) is jumps

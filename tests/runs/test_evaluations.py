"""Each evaluator scores each latest version once."""

import pytest

from fedgrpc.errors import WrongIdentity
from fedgrpc.runs.evaluations import Evaluations


def test_a_version_is_offered_once_and_the_offer_repeated_until_it_is_scored():
    evaluations = Evaluations()
    assert evaluations.offer("a", 0, "t1") is None
    task = evaluations.offer("a", 1, "t2")
    assert (task.worker, task.version) == ("a", 1)
    assert evaluations.offer("a", 1, "t3") is task
    assert evaluations.score(task, {"loss": 0.5}, 10) == {"loss": 0.5}
    assert evaluations.offer("a", 1, "t4") is None
    assert evaluations.offer("a", 2, "t5").version == 2


def test_a_newer_version_takes_the_place_of_one_not_yet_scored():
    evaluations = Evaluations()
    old = evaluations.offer("a", 1, "t6")
    new = evaluations.offer("a", 3, "t7")
    assert (new.version, new.token != old.token) == (3, True)
    assert evaluations.find("a", old.token) is None
    assert evaluations.find("a", new.token) is new


def test_the_scores_of_several_evaluators_are_averaged_by_examples():
    evaluations = Evaluations()
    a, b, c = (evaluations.offer(name, 4, f"token of {name}") for name in "abc")
    evaluations.score(a, {"loss": 1.0, "accuracy": 0.5}, 10)
    assert evaluations.score(b, {"loss": 2.0}, 30) == {"loss": 1.75, "accuracy": 0.5}
    assert evaluations.score(c, {"loss": 100.0}, 0) == {"loss": 1.75, "accuracy": 0.5}


def test_scores_sent_twice_count_once():
    evaluations = Evaluations()
    a, b = evaluations.offer("a", 1, "t9"), evaluations.offer("b", 1, "t10")
    evaluations.score(a, {"loss": 1.0}, 10)
    evaluations.score(a, {"loss": 9.0}, 10)
    assert evaluations.score(b, {"loss": 3.0}, 10) == {"loss": 2.0}


def test_scores_of_another_version_are_not_mixed_in():
    evaluations = Evaluations()
    evaluations.score(evaluations.offer("a", 1, "t11"), {"loss": 1.0}, 10)
    assert evaluations.score(evaluations.offer("a", 2, "t12"), {"loss": 0.5}, 10) == {"loss": 0.5}


def test_a_token_of_another_evaluator_is_a_wrong_identity():
    evaluations = Evaluations()
    task = evaluations.offer("a", 1, "t13")
    with pytest.raises(WrongIdentity):
        evaluations.find("b", task.token)
    assert evaluations.find("a", "unknown") is None


def test_a_version_given_back_is_not_asked_for_again():
    evaluations = Evaluations()
    task = evaluations.offer("a", 1, "t14")
    assert evaluations.waiting_for("a", 1)
    evaluations.give_back(task)
    assert not evaluations.waiting_for("a", 1)
    assert evaluations.offer("a", 1, "t15") is None
    assert evaluations.offer("a", 2, "t16").version == 2

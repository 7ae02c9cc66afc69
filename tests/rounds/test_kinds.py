"""What becomes of the run's policy in rounds that do not train."""

from fedgrpc.rounds.events import Select
from fedgrpc.rounds.policy import RoundPolicy, TaskKind
from tests.support.round_scenario import Scenario

POLICY = RoundPolicy(min_workers=3, min_sample_size=2, quorum=2, over_selection=2.0, selection_window_s=30.0)


def test_the_first_worker_that_comes_is_asked_for_initial_weights_and_no_other_is_waited_for() -> None:
    scenario = Scenario(POLICY.for_kind(TaskKind.INITIALIZE))
    assert scenario.pool("a", live_count=5) == (Select(1, frozenset()),)


def test_scores_are_asked_of_all_who_come_within_the_selection_window() -> None:
    scenario = Scenario(POLICY.for_kind(TaskKind.EVALUATE))
    assert scenario.pool("a", live_count=2) == ()
    assert scenario.pool("ab", live_count=2) == (Select(2, frozenset()),)


def test_a_round_of_training_has_the_run_s_own_policy() -> None:
    assert POLICY.for_kind(TaskKind.TRAIN) is POLICY

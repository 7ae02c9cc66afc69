"""What becomes of the run's policy in rounds that do not train."""

from fedgrpc.aggregator.kinds import policy_of
from fedgrpc.rounds.events import Select
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.v1.round_pb2 import TASK_KIND_EVALUATE, TASK_KIND_INITIALIZE, TASK_KIND_TRAIN
from tests.support.round_scenario import Scenario

POLICY = RoundPolicy(min_workers=3, min_sample_size=2, quorum=2, over_selection=2.0, selection_window_s=30.0)


def test_the_first_worker_that_comes_is_asked_for_initial_weights_and_no_other_is_waited_for() -> None:
    it = Scenario(policy_of(POLICY, TASK_KIND_INITIALIZE))
    assert it.pool("a", live_count=5) == (Select(1, frozenset()),)


def test_scores_are_asked_of_all_who_come_within_the_selection_window() -> None:
    it = Scenario(policy_of(POLICY, TASK_KIND_EVALUATE))
    assert it.pool("a", live_count=2) == ()
    assert it.pool("ab", live_count=2) == (Select(2, frozenset()),)


def test_a_round_of_training_has_the_run_s_own_policy() -> None:
    assert policy_of(POLICY, TASK_KIND_TRAIN) is POLICY

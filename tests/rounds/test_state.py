"""What a round promises, sentence by sentence; the whole transition table is in test_transitions.py."""

from __future__ import annotations

import pytest

from fedgrpc.errors import IllegalTransition, RoundClosed, UnknownTask
from fedgrpc.rounds.events import LossCause, Offer, Select, TaskPhase, Tick
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase, restore, time_left, wake_at
from fedgrpc.rounds.transitions import step
from tests.support.round_scenario import Scenario, cancelled, committed_tokens, finished

# Reporting.


def test_a_round_commits_as_soon_as_all_wanted_updates_are_in() -> None:
    scenario = Scenario().open("ab")
    assert scenario.accept("a") == ()
    assert committed_tokens(scenario.accept("b")) == ("a", "b")
    assert scenario.round.phase is RoundPhase.COMMITTING
    assert scenario.round.reason == "enough updates are in"


def test_updates_are_committed_in_slot_order_whatever_order_they_came_in() -> None:
    forth, back = Scenario().open("abc"), Scenario().open("abc")
    assert committed_tokens(forth.accept("abc")) == committed_tokens(back.accept("cba")) == ("a", "b", "c")


def test_a_round_ends_at_its_deadline_with_whoever_has_reported() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=10.0, lease_s=60.0)).open("abc")
    scenario.progress("b", TaskPhase.DOWNLOADING)
    scenario.accept("a")
    assert wake_at(scenario.round) == scenario.now + 10.0
    effects = scenario.wait(10.0)
    assert committed_tokens(effects) == ("a",)
    assert cancelled(effects) == {"b", "c"}
    assert scenario.loss_cause("b") is LossCause.SLOW_DOWNLOAD
    assert scenario.reason("b") == "slow download: deadline of 10 s passed"
    assert scenario.loss_cause("c") is LossCause.NO_SHOW
    assert scenario.reason("c") == "no-show: deadline of 10 s passed"


def test_a_round_is_abandoned_when_too_few_updates_arrive_by_the_deadline() -> None:
    scenario = Scenario(RoundPolicy(quorum=2, deadline_s=10.0, lease_s=60.0)).open("ab")
    scenario.accept("a")
    end = finished(scenario.wait(10.0))
    assert end is not None
    assert end.reason == "1 of 2 needed updates: deadline of 10 s passed"
    assert scenario.round.phase is RoundPhase.ABANDONED
    assert scenario.phase("a") is TaskPhase.ACCEPTED


def test_heartbeats_do_not_move_the_deadline() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=10.0, lease_s=5.0)).open("ab")
    for _ in range(9):
        scenario.wait(1.0)
        scenario.progress("a")
        scenario.progress("b")
    assert scenario.wait(1.0)
    assert scenario.round.phase is RoundPhase.ABANDONED


def test_the_same_update_counts_once() -> None:
    scenario = Scenario().open("ab")
    scenario.accept("aaa")
    assert scenario.round.accepted == ("a",)
    assert scenario.round.phase is RoundPhase.REPORTING


def test_a_refused_update_is_recorded_with_its_reason_and_the_round_goes_on() -> None:
    scenario = Scenario().open("ab")
    assert scenario.reject("a", "tensor 'w' is missing") == ()
    assert (scenario.phase("a"), scenario.reason("a")) == (TaskPhase.REJECTED, "tensor 'w' is missing")
    with pytest.raises(RoundClosed, match="rejected: tensor 'w' is missing"):
        scenario.accept("a")
    with pytest.raises(RoundClosed):
        scenario.progress("a")
    assert committed_tokens(scenario.accept("b")) is None


def test_bad_news_of_an_accepted_update_changes_nothing() -> None:
    scenario = Scenario().open("ab")
    scenario.accept("a")
    scenario.fail("a")
    scenario.reject("a")
    assert scenario.phase("a") is TaskPhase.ACCEPTED


@pytest.mark.parametrize("phase", [phase for phase in TaskPhase if not phase.open])
def test_a_worker_cannot_say_that_its_task_is_over(phase: TaskPhase) -> None:
    scenario = Scenario().open("ab")
    with pytest.raises(IllegalTransition, match="not for a worker to say"):
        scenario.progress("a", phase)


# Leases and replacement.


def test_a_lease_that_is_not_extended_frees_its_slot() -> None:
    scenario = Scenario(RoundPolicy(lease_s=30.0)).open("ab")
    scenario.wait(29.0)
    scenario.progress("b")
    assert scenario.wait(1.0)
    assert (scenario.phase("a"), scenario.reason("a")) == (TaskPhase.EXPIRED, "no-show: not heard of for 30 s")
    assert scenario.loss_cause("a") is LossCause.NO_SHOW
    assert scenario.phase("b") is TaskPhase.TRAINING
    assert scenario.round.open_count == 1


def test_a_lost_worker_is_replaced_within_the_round_by_one_that_had_no_task() -> None:
    scenario = Scenario(RoundPolicy(max_participants=2, lease_s=30.0)).open("ab")
    scenario.wait(20.0)
    scenario.progress("b")
    scenario.wait(10.0)
    assert scenario.pool("ac") == (Select(1, frozenset("ab")),)
    assert scenario.select("c") == (Offer("c", "c"),)
    assert scenario.round.tasks["c"].slot == 2
    assert scenario.round.deadline_at == 100.0 + scenario.round.policy.deadline_s


def test_nobody_is_asked_while_enough_are_at_work() -> None:
    scenario = Scenario(RoundPolicy(max_participants=2, over_selection=1.5)).open("abc")
    scenario.fail("a")
    assert scenario.pool("de") == ()
    scenario.fail("b")
    assert scenario.pool("de") == (Select(1, frozenset("abc")),)
    assert scenario.pool("de") == ()


def test_news_of_a_lost_worker_revives_its_task() -> None:
    scenario = Scenario(RoundPolicy(lease_s=30.0)).open("ab")
    scenario.wait(30.0)
    scenario.progress("a", TaskPhase.UPLOADING)
    assert (scenario.phase("a"), scenario.reason("a")) == (TaskPhase.UPLOADING, "")
    scenario.accept("b")
    assert committed_tokens(scenario.accept("a")) == ("a", "b")


def test_a_finished_update_of_a_lost_worker_counts() -> None:
    scenario = Scenario(RoundPolicy(lease_s=30.0)).open("ab")
    scenario.wait(30.0)
    assert scenario.round.open_count == 0
    assert committed_tokens(scenario.accept("ab")) == ("a", "b")


def test_a_round_ends_early_when_no_worker_is_left_to_wait_for() -> None:
    scenario = Scenario().open("ab")
    scenario.accept("a")
    scenario.fail("b")
    assert committed_tokens(scenario.pool("ab")) == ("a",)
    assert scenario.round.reason == "no worker is left to wait for"


def test_a_round_without_quorum_waits_for_workers_that_are_out_of_touch() -> None:
    scenario = Scenario(RoundPolicy(quorum=2, lease_s=30.0)).open("ab")
    scenario.accept("a")
    scenario.wait(30.0)
    assert scenario.pool("a") == ()
    assert scenario.round.phase is RoundPhase.REPORTING
    assert committed_tokens(scenario.accept("b")) == ("a", "b")


def test_a_round_whose_workers_all_failed_is_abandoned_at_once() -> None:
    scenario = Scenario().open("ab")
    scenario.fail("a")
    scenario.fail("b")
    end = finished(scenario.pool("ab"))
    assert end is not None
    assert end.reason == "0 of 1 needed updates: no worker is left to wait for"


# Committing and after.


def test_a_committed_round_knows_its_version() -> None:
    scenario = Scenario().open("ab")
    scenario.accept("ab")
    end = finished(scenario.commit(version=7))
    assert end is not None
    assert end.committed
    assert (scenario.round.phase, scenario.round.version) == (RoundPhase.COMMITTED, 7)


@pytest.mark.parametrize("phase", [RoundPhase.COMMITTING, RoundPhase.COMMITTED, RoundPhase.ABANDONED])
def test_a_closed_round_takes_no_more_updates(phase: RoundPhase) -> None:
    scenario = Scenario(RoundPolicy(max_participants=1, over_selection=2.0)).open("ab")
    scenario.accept("a")
    if phase is RoundPhase.COMMITTED:
        scenario.commit()
    elif phase is RoundPhase.ABANDONED:
        scenario.abort()
    with pytest.raises(RoundClosed, match=f"round 1 takes no more updates: it is {phase.name.lower()}"):
        scenario.accept("b")


def test_a_token_of_another_round_is_unknown() -> None:
    for scenario in (Scenario(), Scenario().open("ab")):
        with pytest.raises(UnknownTask):
            scenario.accept("z")
        with pytest.raises(UnknownTask):
            scenario.progress("z")


def test_a_stopped_round_cancels_every_task_that_is_not_over() -> None:
    scenario = Scenario(RoundPolicy(lease_s=30.0)).open("abc")
    scenario.accept("a")
    scenario.wait(20.0)
    scenario.progress("b")
    scenario.wait(10.0)
    effects = scenario.abort("stopped by an operator")
    assert cancelled(effects) == {"b", "c"}
    assert scenario.reason("c") == "stopped by an operator"
    assert scenario.round.reason == "stopped by an operator"


def test_a_commit_that_fails_abandons_the_round() -> None:
    scenario = Scenario().open("ab")
    scenario.accept("ab")
    end = finished(scenario.abort("disk full"))
    assert end is not None
    assert not end.committed
    assert scenario.round.version is None


def test_answers_that_come_after_the_end_are_ignored() -> None:
    scenario = Scenario(RoundPolicy(max_participants=2, deadline_s=10.0, quorum=2, lease_s=5.0)).open("ab")
    scenario.wait(5.0)
    assert scenario.pool("c", live_count=3)
    scenario.wait(5.0)
    assert scenario.round.phase is RoundPhase.ABANDONED
    assert scenario.select("c") == ()
    assert "c" not in scenario.round.tasks


# Time.


def test_time_left_counts_down_to_the_deadline_and_not_below() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=10.0))
    assert time_left(scenario.round, scenario.now) is None
    scenario.open("ab")
    assert time_left(scenario.round, scenario.now + 4.0) == 6.0
    assert time_left(scenario.round, scenario.now + 40.0) == 0.0


def test_a_round_wakes_for_the_next_lease_or_the_deadline_whichever_comes_first() -> None:
    scenario = Scenario(RoundPolicy(lease_s=30.0, deadline_s=40.0)).open("ab")
    assert wake_at(scenario.round) == 130.0
    scenario.wait(20.0)
    scenario.progress("a")
    assert wake_at(scenario.round) == 130.0
    scenario.progress("b")
    assert wake_at(scenario.round) == 140.0
    scenario.accept("ab")
    assert wake_at(scenario.round) is None


# Restarting.


def test_a_restored_round_has_the_same_accepted_updates_and_fresh_leases() -> None:
    rows = [
        ("a", "A", TaskPhase.ACCEPTED, ""),
        ("b", "B", TaskPhase.UPLOADING, ""),
        ("c", "C", TaskPhase.FAILED, "oom"),
    ]
    round_ = restore(7, RoundPolicy(lease_s=30.0), rows, aim=2, deadline_left_s=90.0, now=1000.0)
    assert (round_.number, round_.accepted, round_.aim) == (7, ("a",), 2)
    assert round_.tasks["b"].lease_until == 1030.0
    assert round_.deadline_at == 1090.0
    assert [task.slot for task in round_.tasks.values()] == [0, 1, 2]
    scenario = Scenario(round_=round_)
    assert committed_tokens(scenario.accept("b")) == ("a", "b")


def test_a_restored_round_whose_updates_are_enough_commits_at_once() -> None:
    rows = [("a", "A", TaskPhase.ACCEPTED, ""), ("b", "B", TaskPhase.OFFERED, "")]
    round_ = restore(7, RoundPolicy(), rows, aim=1, deadline_left_s=50.0, now=1000.0)
    assert wake_at(round_) == 1000.0
    after, effects = step(round_, Tick(), 1000.0)
    assert committed_tokens(effects) == ("a",)
    assert after.reason == "enough updates are in"


@pytest.mark.parametrize(("left_s", "deadline_at"), [(-30 * 86_400.0, 1045.0), (86_400.0, 1600.0)])
def test_a_wall_clock_that_was_set_cannot_make_a_restored_round_longer(left_s: float, deadline_at: float) -> None:
    rows = [("a", "A", TaskPhase.OFFERED, "")]
    policy = RoundPolicy(deadline_s=600.0, reconnect_grace_s=45.0)
    round_ = restore(7, policy, rows, aim=1, deadline_left_s=left_s, now=1000.0)
    assert round_.deadline_at == deadline_at


@pytest.mark.parametrize("left_s", [-3600.0, 0.0, 7.0])
def test_a_round_whose_deadline_passed_while_the_aggregator_was_away_takes_what_was_finished_meanwhile(
    left_s: float,
) -> None:
    rows = [("a", "A", TaskPhase.TRAINING, "")]
    policy = RoundPolicy(deadline_s=10.0, lease_s=90.0, reconnect_grace_s=60.0)
    scenario = Scenario(round_=restore(7, policy, rows, aim=2, deadline_left_s=left_s, now=100.0))
    assert scenario.round.granted_s == 60.0 - max(left_s, 0.0)
    assert not scenario.wait(59.9)
    scenario.accept("a")
    assert committed_tokens(scenario.wait(0.1)) == ("a",)
    assert "restart" in scenario.round.reason


def test_restarts_together_add_no_more_than_a_deadline_to_a_round() -> None:
    policy, granted_s, added = RoundPolicy(deadline_s=100.0, reconnect_grace_s=60.0), 0.0, []
    for _ in range(4):
        round_ = restore(7, policy, [("a", "A", TaskPhase.OFFERED, "")], 1, -1.0, 0.0, granted_s)
        assert round_.deadline_at is not None
        added.append(round_.deadline_at)
        granted_s = round_.granted_s
    assert added == [60.0, 40.0, 0.0, 0.0]

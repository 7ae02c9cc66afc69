"""Who takes part in a round, and how long it waits for them, sentence by sentence."""

from __future__ import annotations

import pytest

from fedgrpc.errors import IllegalTransition
from fedgrpc.rounds.events import Offer, Select, TaskPhase
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase, wake_at
from tests.support.round_scenario import Scenario, committed_tokens, finished


def test_a_round_waits_until_enough_workers_are_idle() -> None:
    scenario = Scenario(RoundPolicy(min_workers=3))
    assert scenario.pool("ab") == ()
    assert scenario.pool("abc") == (Select(3, frozenset()),)


@pytest.mark.parametrize("policy", [RoundPolicy(min_sample_size=3), RoundPolicy(quorum=3)])
def test_a_round_waits_for_as_many_workers_as_it_needs_updates(policy: RoundPolicy) -> None:
    scenario = Scenario(policy)
    assert scenario.pool("ab") == ()
    assert scenario.pool("abc") == (Select(3, frozenset()),)


def test_the_other_live_workers_get_the_selection_window_to_come() -> None:
    scenario = Scenario(RoundPolicy(selection_window_s=1.0))
    assert scenario.pool("ab", live_count=4) == ()
    assert wake_at(scenario.round) == scenario.now + 1.0
    scenario.wait(0.9)
    assert scenario.pool("abc", live_count=4) == ()
    scenario.wait(0.1)
    assert scenario.pool("abc", live_count=4) == (Select(4, frozenset()),)


def test_the_selection_window_starts_anew_when_too_few_are_left_for_as_long_as_it() -> None:
    scenario = Scenario(RoundPolicy(selection_window_s=1.0))
    scenario.pool("ab", live_count=3)
    scenario.pool("a", live_count=3)
    assert wake_at(scenario.round) is None
    scenario.wait(0.7)
    scenario.pool("a", live_count=3)
    scenario.wait(0.7)
    assert scenario.pool("ab", live_count=3) == ()
    assert wake_at(scenario.round) == scenario.now + 1.0


def test_the_selection_window_runs_out_though_workers_that_poll_again_are_not_idle_for_a_moment() -> None:
    scenario = Scenario(RoundPolicy(selection_window_s=1.0))
    for _ in range(3):
        assert scenario.pool("ab", live_count=3) == ()
        scenario.wait(0.3)
        assert scenario.pool("a", live_count=3) == ()
        scenario.wait(0.05)
    assert scenario.pool("ab", live_count=3) == (Select(3, frozenset()),)


def test_the_selection_window_goes_on_when_the_chosen_were_polling_again() -> None:
    scenario = Scenario(RoundPolicy(selection_window_s=1.0, min_sample_size=2))
    scenario.pool("ab", live_count=3)
    scenario.wait(1.0)
    assert scenario.pool("ab", live_count=3)
    assert scenario.select("a") == ()
    assert wake_at(scenario.round) is None
    scenario.wait(0.05)
    assert scenario.pool("ab", live_count=3) == (Select(3, frozenset()),)


def test_a_round_asks_once_and_then_waits_for_the_answer() -> None:
    scenario = Scenario(RoundPolicy(selection_timeout_s=5.0, selection_window_s=1.0))
    scenario.pool("a", live_count=3)
    scenario.pool("ab", live_count=3)
    scenario.wait(1.0)
    assert scenario.pool("ab", live_count=3)
    assert scenario.pool("abc") == ()
    assert wake_at(scenario.round) is None
    assert scenario.wait(60.0) == ()


def test_a_round_asks_again_when_the_workers_went_away_before_they_were_chosen() -> None:
    scenario = Scenario(RoundPolicy(min_sample_size=2, min_workers=1))
    scenario.pool("ab")
    assert scenario.select("a") == ()
    assert scenario.round.phase is RoundPhase.SELECTING
    assert scenario.pool("ab") == (Select(2, frozenset()),)


def test_a_round_is_abandoned_when_too_few_workers_come_in_time() -> None:
    scenario = Scenario(RoundPolicy(min_workers=3, selection_timeout_s=60.0))
    scenario.pool("ab")
    assert wake_at(scenario.round) == scenario.now + 60.0
    end = finished(scenario.wait(60.0))
    assert end is not None
    assert not end.committed
    assert end.reason == scenario.round.reason == "fewer than 3 workers came within 60 s"


def test_over_selection_asks_more_workers_than_updates_are_wanted() -> None:
    scenario = Scenario(RoundPolicy(max_participants=3, over_selection=1.3))
    assert scenario.pool("abcdef") == (Select(4, frozenset()),)
    scenario.select("abcd")
    assert scenario.round.aim == 3
    assert committed_tokens(scenario.accept("bcd")) == ("b", "c", "d")


def test_a_round_wants_no_more_updates_than_workers_were_found() -> None:
    scenario = Scenario(RoundPolicy(fraction=1.0, selection_window_s=0.0))
    scenario.pool("ab", live_count=10)
    scenario.select("ab")
    assert scenario.round.aim == 2


def test_every_selected_worker_is_offered_its_task_in_slot_order() -> None:
    scenario = Scenario()
    scenario.pool("ab")
    assert scenario.select("ba") == (Offer("b", "b"), Offer("a", "a"))
    assert [task.slot for task in scenario.round.tasks.values()] == [0, 1]
    assert scenario.phase("a") is TaskPhase.OFFERED


def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(IllegalTransition, match="not asked"):
        Scenario().select("ab")
    with pytest.raises(IllegalTransition, match="not asked"):
        Scenario().open("ab").select("c")


def test_more_tasks_than_asked_for_are_refused() -> None:
    scenario = Scenario(RoundPolicy(max_participants=2))
    scenario.pool("abc")
    with pytest.raises(IllegalTransition, match="3 tasks where round 1 asked for 2"):
        scenario.select("abc")


@pytest.mark.parametrize("tasks", ["aa", "aba"])
def test_a_worker_gets_one_task_of_a_round(tasks: str) -> None:
    scenario = Scenario()
    scenario.pool("abc")
    with pytest.raises(IllegalTransition, match="worker a has a task in round 1 already"):
        scenario.select(tasks)

"""What comes late: discarded, carried into the next round, or one of a buffer that makes a version."""

from __future__ import annotations

from typing import Any

import pytest

from fedgrpc.errors import RoundClosed, UsageError
from fedgrpc.rounds.events import Accepted, Cancel, CarryOver, LossCause, Select, Selected, TaskPhase, Tick
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase, follow, restore, wake_at
from fedgrpc.rounds.transitions import step
from tests.support.round_scenario import Effects, Scenario, cancelled, committed_tokens, finished


def _carried(effects: Effects) -> set[str]:
    return {effect.token for effect in effects if isinstance(effect, CarryOver)}


def _next(scenario: Scenario) -> tuple[Scenario, Effects]:
    """The round that follows."""
    round_, effects = follow(scenario.round, scenario.round.number + 1, scenario.round.policy, scenario.now)
    after = Scenario(round_=round_)
    after.now = scenario.now
    return after, effects


# Late updates.

CARRY = RoundPolicy(late="carry", deadline_s=10.0, lease_s=60.0)


def _with_one_late(policy: RoundPolicy = CARRY) -> tuple[Scenario, Effects]:
    """Round 1 commits "a" at its deadline; "b" is still training, "c" never came."""
    scenario = Scenario(policy).open("abc")
    scenario.progress("b", TaskPhase.TRAINING)
    scenario.accept("a")
    return scenario, scenario.wait(10.0)


def _next_with_the_late_one_at_work() -> Scenario:
    """Round 2, into which the task of "b" is carried."""
    scenario, _ = _with_one_late()
    scenario.commit()
    return _next(scenario)[0]


def _next_with_the_late_one_in() -> Scenario:
    """The same, its update having come while round 1 was committed."""
    scenario, _ = _with_one_late()
    scenario.accept("b")
    scenario.commit()
    return _next(scenario)[0]


def test_a_late_task_is_discarded_by_default() -> None:
    scenario, effects = _with_one_late(RoundPolicy(deadline_s=10.0, lease_s=60.0))
    assert cancelled(effects) == {"b", "c"}
    assert not _carried(effects)
    with pytest.raises(RoundClosed):
        scenario.accept("b")


def test_a_late_task_that_has_begun_is_carried_and_a_no_show_is_not() -> None:
    scenario, effects = _with_one_late()
    assert (_carried(effects), cancelled(effects)) == ({"b"}, {"c"})
    assert committed_tokens(effects) == ("a",)
    assert scenario.phase("b") is TaskPhase.LATE
    assert scenario.loss_cause("b") is LossCause.SLOW_TRAINING
    assert scenario.reason("b") == "slow training: deadline of 10 s passed; carried into the next round"
    assert scenario.round.find("b").phase is TaskPhase.TRAINING


def test_a_late_task_that_may_have_begun_before_a_restart_is_carried() -> None:
    rows = [("b", "B", TaskPhase.OFFERED), ("a", "A", TaskPhase.ACCEPTED)]
    round_ = restore(1, RoundPolicy(late="carry"), rows, aim=1, deadline_left_s=50.0, now=100.0)
    ended, effects = step(round_, Tick(), 100.0)
    assert ended.phase is RoundPhase.COMMITTING
    assert _carried(effects) == {"b"}


def test_a_carried_update_is_taken_while_its_round_commits_and_counts_in_the_next() -> None:
    scenario, _ = _with_one_late()
    scenario.progress("b", TaskPhase.UPLOADING)
    assert scenario.accept("b") == ()
    scenario.commit()
    after, effects = _next(scenario)
    assert effects == ()
    assert after.round.accepted == ("b",)
    assert after.round.tasks["b"].staleness == 1
    assert after.round.tasks["b"].slot == 0


def test_a_carried_update_comes_on_top_of_what_the_next_round_wants() -> None:
    after = _next_with_the_late_one_in()
    after.open("de")
    assert after.round.aim == 2
    after.accept("d")
    assert after.round.phase is RoundPhase.REPORTING
    assert committed_tokens(after.accept("e")) == ("b", "d", "e")


def test_a_carried_update_does_not_make_a_quorum() -> None:
    after = _next_with_the_late_one_in()
    after.open("de")
    end = finished(after.wait(10.0))
    assert end is not None
    assert end.reason == "0 of 1 needed updates: deadline of 10 s passed"
    third, _ = _next(after)
    assert third.round.accepted == ("b",)
    assert third.round.tasks["b"].staleness == 1


def test_a_worker_whose_carried_update_is_in_may_take_part_in_the_next_round_too() -> None:
    after = _next_with_the_late_one_in()
    (select,) = after.pool("ab")
    assert select == Select(2, frozenset())
    after.send(Selected((("a2", "a"), ("b2", "b"))))
    after.accept(["a2"])
    assert committed_tokens(after.accept(["b2"])) == ("b", "a2", "b2")


def test_a_worker_whose_carried_update_is_in_is_not_counted_twice_while_others_are_waited_for() -> None:
    after = _next_with_the_late_one_in()
    assert after.pool("ab", live_count=3) == ()
    assert after.pool("abc", live_count=3) == (Select(3, frozenset()),)


def test_a_worker_still_at_a_carried_task_is_not_asked() -> None:
    after = _next_with_the_late_one_at_work()
    assert after.pool("ac", live_count=3) == (Select(3, frozenset("b")),)


def test_a_carried_task_is_given_up_when_it_is_too_stale() -> None:
    scenario, _ = _with_one_late(RoundPolicy(late="carry", max_staleness=2, deadline_s=10.0, lease_s=60.0))
    ends: list[set[str]] = []
    for worker in "de":
        scenario.commit()
        scenario, _ = _next(scenario)
        scenario.pool(worker + worker.upper(), live_count=2)
        scenario.select(worker)
        scenario.progress("b")
        ends.append(cancelled(scenario.accept(worker)))
    assert ends == [set(), {"b"}]


def test_an_abandoned_round_hands_its_accepted_updates_on_unaged() -> None:
    scenario = Scenario(RoundPolicy(late="carry", quorum=2, deadline_s=10.0, lease_s=60.0)).open("abc")
    scenario.accept("a")
    effects = scenario.wait(10.0)
    assert _carried(effects) == {"a"}
    assert finished(effects) is not None
    after, _ = _next(scenario)
    assert after.round.tasks["a"].staleness == 0
    assert after.pool("bc", live_count=3) == (Select(2, frozenset("a")),)
    after.select("bc")
    assert after.round.aim == 3
    assert after.accept("b") == ()
    assert committed_tokens(after.accept("c")) == ("a", "b", "c")


def test_a_stopped_round_carries_nothing() -> None:
    scenario, _ = _with_one_late()
    assert cancelled(scenario.abort()) == {"b"}
    after, effects = _next(scenario)
    assert (dict(after.round.tasks), effects) == ({}, ())


def test_a_round_that_discards_has_no_use_for_what_was_carried() -> None:
    scenario, _ = _with_one_late()
    scenario.commit()
    round_, effects = follow(scenario.round, 2, RoundPolicy(), scenario.now)
    assert dict(round_.tasks) == {}
    assert [type(effect) for effect in effects] == [Cancel]


def test_a_carried_task_that_its_worker_gave_back_is_gone_and_the_worker_free() -> None:
    after = _next_with_the_late_one_at_work()
    after.fail("b", "its worker has lost it")
    assert after.pool("ab") == (Select(2, frozenset()),)


def test_a_lost_worker_may_still_deliver_in_the_next_round() -> None:
    scenario = Scenario(RoundPolicy(late="carry", deadline_s=100.0, lease_s=30.0)).open("ab")
    scenario.progress("b", TaskPhase.TRAINING)
    scenario.accept("a")
    scenario.wait(30.0)
    assert scenario.phase("b") is TaskPhase.EXPIRED
    assert _carried(scenario.pool("a")) == {"b"}
    scenario.commit()
    after, _ = _next(scenario)
    after.accept("b")
    assert after.round.accepted == ("b",)


def test_carried_tasks_survive_a_restart_before_the_next_round_has_opened() -> None:
    rows = [("b", "b", TaskPhase.ACCEPTED, "", 1), ("c", "c", TaskPhase.TRAINING, "", 2)]
    round_ = restore(2, CARRY, rows, aim=0, deadline_left_s=None, now=500.0)
    assert round_.phase is RoundPhase.SELECTING
    assert (round_.tasks["b"].staleness, round_.tasks["c"].staleness) == (1, 2)
    assert round_.workers == frozenset("c")
    assert wake_at(round_) == 560.0


# A buffer instead of rounds.

BUFFER = RoundPolicy(late="carry", buffer_size=2, max_participants=3, deadline_s=100.0, lease_s=60.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"buffer_size": 2},
        {"buffer_size": 2, "late": "carry", "over_selection": 1.3},
        {"buffer_size": 2, "late": "carry", "quorum": 3},
        {"buffer_size": 0, "late": "carry"},
        {"late": "later"},
        {"max_staleness": 0},
        {"weight_aim": 0.0},
        {"deadline_floor_s": 601.0},
        {"deadline_floor_s": -1.0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        RoundPolicy(**settings)


def test_a_buffer_commits_every_k_updates_and_the_others_go_on() -> None:
    scenario = Scenario(BUFFER).open("abcd")
    for worker in "abc":
        scenario.progress(worker)
    scenario.accept("b")
    effects = scenario.accept("a")
    assert committed_tokens(effects) == ("a", "b")
    assert _carried(effects) == {"c"}


def test_a_buffer_replaces_every_worker_that_has_reported() -> None:
    scenario = Scenario(BUFFER).open("abcd")
    scenario.accept("a")
    assert scenario.pool("ad", live_count=4) == (Select(1, frozenset("abc")),)


def test_the_next_buffer_begins_at_once_with_whoever_is_at_work() -> None:
    scenario = Scenario(BUFFER).open("abcd")
    for worker in "abc":
        scenario.progress(worker)
    scenario.accept("ab")
    scenario.commit()
    after, _ = _next(scenario)
    assert after.pool("a", live_count=4) == (Select(1, frozenset("c")),)
    after.send(Selected((("a2", "a"),)))
    assert after.round.phase is RoundPhase.REPORTING
    assert after.round.aim == 2
    after.accept("c")
    assert committed_tokens(after.send(Accepted("a2"))) == ("c", "a2")
    assert [task.staleness for task in after.round.tasks.values()] == [1, 0]


def test_the_next_buffer_needs_no_idle_worker_to_begin() -> None:
    scenario = Scenario(RoundPolicy(late="carry", buffer_size=1, lease_s=60.0)).open("ab")
    scenario.progress("b")
    scenario.accept("a")
    scenario.commit()
    after, _ = _next(scenario)
    assert after.pool("", live_count=2) == ()
    assert after.round.phase is RoundPhase.REPORTING
    assert committed_tokens(after.accept("b")) == ("b",)


def test_stale_updates_fill_a_buffer_like_fresh_ones() -> None:
    scenario = Scenario(RoundPolicy(late="carry", buffer_size=2, quorum=2, lease_s=60.0)).open("abcd")
    for worker in "abcd":
        scenario.progress(worker)
    scenario.accept("ab")
    scenario.commit()
    after, _ = _next(scenario)
    after.pool("", live_count=4)
    assert committed_tokens(after.accept("cd")) == ("c", "d")


def test_a_fleet_smaller_than_the_buffer_still_commits() -> None:
    scenario = Scenario(RoundPolicy(late="carry", buffer_size=10)).open("ab")
    scenario.accept("ab")
    assert committed_tokens(scenario.pool("ab")) == ("a", "b")


def test_a_buffer_short_of_its_quorum_at_the_deadline_loses_nothing() -> None:
    scenario = Scenario(RoundPolicy(late="carry", buffer_size=3, quorum=2, deadline_s=10.0, lease_s=60.0)).open(
        "abc"
    )
    scenario.progress("b")
    scenario.accept("a")
    assert _carried(scenario.wait(10.0)) == {"a", "b"}
    after, _ = _next(scenario)
    after.pool("", live_count=3)
    after.accept("b")
    assert committed_tokens(after.wait(10.0)) == ("a", "b")

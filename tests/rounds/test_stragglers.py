"""What becomes of the slow: learned deadlines, hopeless uploads, and rounds that wait for nobody."""

from __future__ import annotations

import pytest

from fedgrpc.rounds.events import Accepted, Deadline, LossCause, Progress, Select, Selected, TaskPhase
from fedgrpc.rounds.policy import RoundPolicy
from tests.support.round_scenario import Effects, Scenario, cancelled, committed_tokens, finished

MIB = 1 << 20


def _upload(scenario: Scenario, token: str, held: int, total: int = 100 * MIB) -> Effects:
    return scenario.send(Progress(token, TaskPhase.UPLOADING, held / total, held, total))


# Enough weight.


def test_a_round_commits_early_once_enough_weight_has_reported() -> None:
    scenario = Scenario(RoundPolicy(weight_aim=100.0)).open("abc")
    assert scenario.send(Accepted("a", weight=60.0)) == ()
    assert committed_tokens(scenario.send(Accepted("b", weight=40.0))) == ("a", "b")
    assert scenario.round.reason == "enough weight is in"


def test_enough_weight_is_not_enough_without_the_quorum() -> None:
    scenario = Scenario(RoundPolicy(weight_aim=100.0, quorum=2)).open("abc")
    assert scenario.send(Accepted("a", weight=500.0)) == ()
    assert committed_tokens(scenario.send(Accepted("b", weight=1.0))) == ("a", "b")


# The deadline that was learned.


def test_a_round_keeps_the_deadline_that_its_selection_came_with() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=60.0))
    scenario.pool("ab")
    scenario.send(Selected((("a", "a"), ("b", "b")), deadline=Deadline(40.0, "2 of 2 are expected within 32 s")))
    assert scenario.round.deadline_at == scenario.now + 40.0
    assert scenario.round.deadline_reason == "2 of 2 are expected within 32 s"
    end = finished(scenario.wait(40.0))
    assert end is not None
    assert "deadline of 40 s passed" in end.reason


@pytest.mark.parametrize(("learned_s", "kept_s"), [(1.0, 20.0), (40.0, 40.0), (9e9, 600.0)])
def test_a_learned_deadline_stays_between_floor_and_ceiling(learned_s: float, kept_s: float) -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, deadline_floor_s=20.0))
    scenario.pool("ab")
    scenario.send(Selected((("a", "a"), ("b", "b")), deadline=Deadline(learned_s, "")))
    assert scenario.round.deadline_at == scenario.now + kept_s


def test_a_task_remembers_why_its_worker_was_chosen() -> None:
    scenario = Scenario()
    scenario.pool("ab")
    scenario.send(Selected((("a", "a"), ("b", "b")), reasons={"a": "not tried yet"}))
    assert [task.chosen for task in scenario.round.tasks.values()] == ["not tried yet", ""]


# Trickling uploads.


def _trickle(scenario: Scenario, token: str, bytes_per_5_s: int, seconds: float) -> Effects:
    """Time passes, and a few bytes come every 5 s; what it led to."""
    effects: Effects = ()
    pace = scenario.round.tasks[token].pace
    held = pace.held if pace else 0
    for _ in range(int(seconds / 5)):
        effects += scenario.wait(5.0)
        held += bytes_per_5_s
        effects += _upload(scenario, token, held)
        if effects:
            break
    return effects


def test_a_trickling_upload_gives_up_its_slot_when_it_cannot_make_it() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    scenario.accept("a")
    _upload(scenario, "b", 0)
    assert cancelled(_trickle(scenario, "b", 1000, seconds=600.0)) == {"b"}
    assert scenario.now == 130.0
    assert scenario.phase("b") is TaskPhase.EXPIRED
    assert scenario.loss_cause("b") is LossCause.SLOW_UPLOAD
    assert scenario.reason("b") == "slow upload: 104851600 bytes are due in 570 s"
    assert scenario.pool("c", live_count=3) == (Select(1, frozenset("ab")),)


def test_an_upload_that_just_makes_it_keeps_its_slot_to_the_end() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    scenario.accept("a")
    _upload(scenario, "b", 0)
    assert _trickle(scenario, "b", 100 * MIB // 119, seconds=595.0) == ()


def test_an_upload_in_lumps_is_not_judged_between_them() -> None:
    """A megabyte every 25 s, with heartbeats in between, is 24 of them in 600 s."""
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    scenario.accept("a")
    for second in range(0, 590, 5):
        assert _upload(scenario, "b", second // 25 * MIB, total=23 * MIB) == ()
        assert scenario.wait(5.0) == ()


def test_heartbeats_without_bytes_do_not_hold_a_slot() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    scenario.accept("a")
    _upload(scenario, "b", 0)
    _upload(scenario, "b", MIB)
    for _ in range(5):
        scenario.wait(5.0)
        assert scenario.progress("b", TaskPhase.UPLOADING) == ()
    scenario.wait(5.0)
    assert cancelled(scenario.progress("b", TaskPhase.UPLOADING)) == {"b"}


def test_an_upload_that_was_given_up_comes_back_when_it_gains_speed() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    scenario.accept("a")
    _upload(scenario, "b", 0)
    assert _trickle(scenario, "b", 1000, seconds=600.0)
    assert _trickle(scenario, "b", 5 * MIB, seconds=60.0) == ()
    assert (scenario.phase("b"), scenario.reason("b")) == (TaskPhase.UPLOADING, "")
    assert committed_tokens(scenario.accept("b")) == ("a", "b")


def test_a_stall_long_past_is_forgotten() -> None:
    """A link that was down for minutes and is up again is judged by what it does now."""
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    scenario.accept("a")
    _upload(scenario, "b", 0)
    scenario.wait(400.0)
    _trickle(scenario, "b", 3 * MIB, seconds=70.0)
    assert scenario.phase("b") is TaskPhase.UPLOADING


def test_without_counts_of_bytes_no_upload_is_judged() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=600.0, lease_s=30.0)).open("ab")
    for _ in range(100):
        scenario.now += 5.0
        scenario.progress("a", TaskPhase.UPLOADING, 0.0)
    assert scenario.phase("a") is TaskPhase.UPLOADING

"""The round's deadline is the one that the wanted fraction is expected to meet."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.history import (
    CUT_FACTOR,
    KEPT,
    Timing,
    WorkerHistory,
    expected_parts,
    expected_s,
    quantile,
    timing_of,
    usual_parts,
)
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import DeadlineRule, learned_deadline
from tests.support.round_scenario import Scenario


def _history(*timings: Timing) -> WorkerHistory:
    history = WorkerHistory()
    for timing in timings:
        history = history.timed(timing)
    return history


def _steady(seconds: float) -> WorkerHistory:
    return _history(*[Timing(0.1 * seconds, 0.7 * seconds, 0.2 * seconds)] * 4)


EXACT = DeadlineRule(margin=1.0)


def _times_of(token: str, scenario: Scenario) -> Timing | None:
    return timing_of(scenario.round.tasks[token])


def test_the_aggregator_sees_where_the_time_of_a_task_went() -> None:
    scenario = Scenario(RoundPolicy(lease_s=60.0)).open("ab")
    scenario.now += 2.0
    scenario.progress("a", TaskPhase.DOWNLOADING)
    scenario.now += 3.0
    scenario.progress("a", TaskPhase.TRAINING)
    scenario.now += 20.0
    scenario.progress("a", TaskPhase.UPLOADING)
    scenario.now += 5.0
    scenario.accept("a")
    assert _times_of("a", scenario) == Timing(3.0, 20.0, 5.0)
    assert _times_of("b", scenario) is None


def test_of_a_late_task_it_sees_the_part_that_was_cut_short() -> None:
    scenario = Scenario(RoundPolicy(deadline_s=30.0, lease_s=60.0)).open("ab")
    scenario.progress("a", TaskPhase.DOWNLOADING)
    scenario.now += 4.0
    scenario.progress("a", TaskPhase.TRAINING)
    scenario.wait(26.0)
    assert _times_of("a", scenario) == Timing(4.0, 26.0, None, cut=True)
    assert _times_of("b", scenario) is None


def test_parts_between_two_heartbeats_go_unseen() -> None:
    scenario = Scenario(RoundPolicy(lease_s=60.0)).open("ab")
    scenario.now += 3.0
    scenario.progress("a", TaskPhase.TRAINING)
    scenario.now += 5.0
    scenario.accept("a")
    assert _times_of("a", scenario) == Timing(None, 5.0, None)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_enough_do_not_exceed_it(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < max(share * len(values), 1)


def test_a_quantile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_a_worker_is_expected_to_take_the_quantile_of_each_of_its_parts() -> None:
    history = _history(*(Timing(float(i), 10.0 * i, 100.0 * (11 - i)) for i in range(1, 11)))
    assert expected_parts(history, 0.9) == [9.0, 90.0, 900.0]
    assert expected_s(history, 0.9) == 999.0
    assert expected_s(history, 0.5) == 5.0 + 50.0 + 500.0


def test_one_bad_night_does_not_move_what_is_expected() -> None:
    history = _history(*[Timing(1.0, 10.0, 2.0)] * 15, Timing(500.0, 10.0, 3000.0))
    assert expected_s(history, 0.9) == 13.0


def test_a_worker_that_became_slow_is_soon_expected_to_be() -> None:
    history = _history(*[Timing(1.0, 10.0, 2.0)] * 100, *[Timing(1.0, 40.0, 2.0)] * 2)
    assert expected_s(history, 0.9) == 43.0
    assert len(history.timings) == KEPT


def test_a_part_that_was_cut_short_is_taken_for_longer_than_it_was_seen() -> None:
    history = _history(Timing(1.0, 30.0, cut=True))
    assert expected_parts(history, 0.9) == [1.0, 30.0 * CUT_FACTOR, None]
    assert expected_s(history, 0.9) is None
    assert expected_s(history, 0.9, usual=[9.0, 9.0, 5.0]) == 1.0 + 45.0 + 5.0


def test_a_worker_that_is_cut_again_and_again_is_given_more_and_more() -> None:
    history, deadline_s = _steady(10.0), 10.0
    for _ in range(8):
        history = history.timed(Timing(1.0, deadline_s - 1.0, cut=True))
        expected = expected_s(history, 0.9)
        assert expected is not None
        deadline_s = expected
    assert deadline_s > 60.0


def test_a_worker_never_seen_is_taken_for_a_median_one() -> None:
    histories = {"a": _steady(10.0), "b": _steady(20.0), "c": _steady(90.0)}
    assert usual_parts(histories.values(), 0.9) == pytest.approx([2.0, 14.0, 4.0])
    deadline = learned_deadline(["new"], 1, histories, EXACT)
    assert deadline is not None
    assert deadline.seconds == pytest.approx(20.0)


def test_nothing_is_learned_from_nothing() -> None:
    assert learned_deadline(["a", "b"], 2, {}) is None
    assert learned_deadline(["a"], 1, {"a": WorkerHistory()}) is None


@pytest.mark.parametrize(("aim", "seconds"), [(1, 10.0), (2, 20.0), (3, 90.0), (9, 90.0)])
def test_the_deadline_is_the_one_that_as_many_as_are_wanted_meet(aim: int, seconds: float) -> None:
    histories = {"a": _steady(10.0), "b": _steady(20.0), "c": _steady(90.0)}
    deadline = learned_deadline("cab", aim, histories, EXACT)
    assert deadline is not None
    assert deadline.seconds == pytest.approx(seconds)
    slowest = {10.0: "a", 20.0: "b", 90.0: "c"}[seconds]
    assert deadline.reason == f"{min(aim, 3)} of 3 are expected within {seconds:g} s, {slowest} as the last"


def test_the_margin_is_added_on_top() -> None:
    deadline = learned_deadline(["a"], 1, {"a": _steady(10.0)}, DeadlineRule(margin=1.5))
    assert deadline is not None
    assert deadline.seconds == pytest.approx(15.0)


def test_as_many_as_are_wanted_do_meet_it_most_of_the_times() -> None:
    """Forty workers of log-normal times, thirty wanted: learned on 16 tasks each, tried on a thousand new ones."""
    rng = np.random.default_rng(4)
    medians = np.exp(rng.normal(3, 0.7, size=40))

    def draw() -> np.ndarray:
        return np.asarray(medians * np.exp(rng.normal(0, 0.3, size=40)))

    histories = {str(i): WorkerHistory() for i in range(40)}
    for _ in range(KEPT):
        for i, total in enumerate(draw()):
            histories[str(i)] = histories[str(i)].timed(Timing(0.1 * total, 0.8 * total, 0.1 * total))
    deadline = learned_deadline([str(i) for i in range(40)], 30, histories)
    assert deadline is not None
    met = np.mean([(draw() <= deadline.seconds).sum() >= 30 for _ in range(1000)])
    assert met > 0.95
    needed = np.median([np.sort(draw())[29] for _ in range(1000)])
    assert deadline.seconds < 2.0 * needed
    assert math.isfinite(deadline.seconds)

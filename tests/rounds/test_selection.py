"""Who is chosen, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.rounds.history import Timing, WorkerHistory
from fedgrpc.rounds.selection import OortRule, choose_oort, choose_uniform, utilities

EXPLOIT = OortRule(fairness=0.0, exploration=0.0, exploration_floor=0.0)


def _worker(loss: float = 1.0, examples: int = 100, seconds: float = 10.0, selected_in: int = 1) -> WorkerHistory:
    return WorkerHistory((Timing(0.0, seconds, 0.0),), 1, 1, selected_in, loss, examples)


def _rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(
    idle=st.sets(st.sampled_from("abcdefghij")),
    tried=st.sets(st.sampled_from("abcdefghij")),
    count=st.integers(0, 12),
    round_number=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_as_many_distinct_idle_workers_as_there_are_get_chosen_each_with_a_reason(
    idle: set[str], tried: set[str], count: int, round_number: int, seed: int
) -> None:
    histories = {worker: _worker(loss=float(ord(worker) - 96)) for worker in tried}
    names = sorted(idle)
    chosen = choose_oort(tuple(names), count, histories, round_number, _rng(seed))
    workers = [choice.worker for choice in chosen]
    assert len(workers) == len(set(workers)) == min(count, len(idle))
    assert set(workers) <= idle
    assert all(choice.reason for choice in chosen)
    assert chosen == choose_oort(tuple(names[::-1]), count, histories, round_number, _rng(seed))


def test_a_useful_worker_is_preferred() -> None:
    histories = {"a": _worker(loss=0.1), "b": _worker(loss=2.0), "c": _worker(loss=0.1)}
    (choice,) = choose_oort(("a", "b", "c"), 1, histories, 10, _rng(), EXPLOIT)
    assert choice.worker == "b"
    assert choice.reason.startswith("utility ")
    assert choice.reason.endswith(": loss 2 on 100 examples, 10 s")


def test_of_equally_useful_workers_the_slow_one_counts_for_less() -> None:
    histories = {worker: _worker(seconds=10.0) for worker in "abc"} | {"slow": _worker(seconds=40.0)}
    utility = utilities(histories, 1, OortRule())
    assert utility["slow"] == pytest.approx(utility["a"] / 16)


def test_a_worker_not_tried_for_long_is_worth_another_look() -> None:
    histories = {"old": _worker(selected_in=2), "recent": _worker(selected_in=99)}
    utility = utilities(histories, 100, OortRule())
    assert utility["old"] > 1.2 * utility["recent"]


def test_one_absurd_loss_does_not_take_every_seat() -> None:
    histories = {f"w{i:02}": _worker(loss=1.0) for i in range(40)} | {"absurd": _worker(loss=1e9)}
    assert utilities(histories, 1, OortRule())["absurd"] == utilities(histories, 1, OortRule())["w00"]


def test_exploration_begins_high_and_falls_to_its_floor() -> None:
    rule = OortRule()
    shares = [rule.explored_share(number) for number in (1, 2, 50, 1000)]
    assert shares[0] == 0.9
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0.2


def test_untried_workers_get_their_share_of_the_seats() -> None:
    histories = {f"tried{i}": _worker() for i in range(20)}
    idle = (*histories, *(f"new{i}" for i in range(20)))
    rule = OortRule(fairness=0.0, exploration=0.5, exploration_floor=0.0)
    chosen = choose_oort(idle, 10, histories, 1, _rng(), rule)
    new = [choice for choice in chosen if choice.worker.startswith("new")]
    assert len(new) == 5
    assert {choice.reason for choice in new} == {"never tried"}


def test_in_the_first_round_everybody_is_untried() -> None:
    chosen = choose_oort(tuple("abcdef"), 4, {}, 1, _rng())
    assert len(chosen) == 4


def test_nobody_is_left_out_for_ever_however_slow_and_useless() -> None:
    """Thirty workers, five seats, a fifth of them by fairness: each takes part within thirty rounds."""
    histories = {f"w{i:02}": _worker(loss=float(i), seconds=1000.0 / (i + 1), selected_in=0) for i in range(30)}
    rule = OortRule(fairness=0.2, exploration=0.0, exploration_floor=0.0)
    last_seen = dict.fromkeys(histories, 0)
    longest = 0
    for number in range(1, 201):
        chosen = choose_oort(tuple(histories), 5, histories, number, _rng(number), rule)
        for choice in chosen:
            longest = max(longest, number - last_seen[choice.worker])
            last_seen[choice.worker] = number
            histories[choice.worker] = histories[choice.worker].chosen(number)
    assert longest <= 30
    assert all(200 - seen <= 30 for seen in last_seen.values())


def test_a_seat_by_fairness_says_for_how_long_the_worker_has_waited() -> None:
    histories = {"a": _worker(selected_in=3), "b": _worker(selected_in=9, loss=5.0)}
    (choice,) = choose_oort(("a", "b"), 1, histories, 10, _rng(), OortRule(fairness=1.0))
    assert (choice.worker, choice.reason) == ("a", "has waited for 7 rounds")


@given(
    idle=st.sets(st.text("abcdef", min_size=1, max_size=3), max_size=20),
    count=st.integers(0, 25),
    seed=st.integers(0, 2**32),
)
def test_uniform_selection_takes_distinct_idle_workers_and_ignores_their_order(
    idle: set[str], count: int, seed: int
) -> None:
    names = sorted(idle)
    choices = choose_uniform(tuple(names), count, np.random.default_rng(seed))
    chosen = [choice.worker for choice in choices]
    assert len(chosen) == len(set(chosen)) == min(count, len(idle))
    assert set(chosen) <= idle
    assert choices == choose_uniform(tuple(reversed(names)), count, np.random.default_rng(seed))


def test_uniform_selection_takes_every_worker_equally_often() -> None:
    rng = np.random.default_rng(1)
    counts = dict.fromkeys("abcde", 0)
    for _ in range(5000):
        for choice in choose_uniform(tuple("abcde"), 2, rng):
            counts[choice.worker] += 1
    # Each count is binomial(5000, 0.4): mean 2000, standard deviation 35.
    assert all(abs(count - 2000) < 5 * 35 for count in counts.values())


def test_uniform_choices_have_their_reason_too() -> None:
    chosen = choose_uniform(("a", "b", "c"), 2, _rng())
    assert len(chosen) == 2
    assert {choice.reason for choice in chosen} == {"one of 3 by lot"}


@pytest.mark.parametrize(
    "settings",
    [{"fairness": 1.1}, {"exploration": -0.1}, {"preferred_share": 0.0}, {"slow_penalty": -1.0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        OortRule(**settings)

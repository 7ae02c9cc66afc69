from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy


@pytest.mark.parametrize(
    "settings",
    [
        {"min_workers": 0},
        {"min_sample_size": 0},
        {"max_participants": 2, "min_sample_size": 3},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"fraction": math.nan},
        {"over_selection": 0.9},
        {"over_selection": 11.0},
        {"over_selection": math.nan},
        {"quorum": 0},
        {"quorum": 3, "max_participants": 2},
        {"deadline_s": 0.0},
        {"deadline_s": math.inf},
        {"deadline_s": math.nan},
        {"lease_s": -1.0},
        {"selection_window_s": -1.0},
        {"selection_timeout_s": 0.0},
        {"selection_timeout_s": math.nan},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_its_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        replace(RoundPolicy(), **settings)


@pytest.mark.parametrize(
    ("policy", "live_count", "aim", "ask"),
    [
        (RoundPolicy(), 10, 10, 10),
        (RoundPolicy(fraction=0.5), 5, 3, 3),
        (RoundPolicy(fraction=0.07), 100, 7, 7),
        (RoundPolicy(fraction=0.1, over_selection=1.1), 100, 10, 11),
        (RoundPolicy(fraction=0.1, over_selection=1.3), 100, 10, 13),
        (RoundPolicy(fraction=0.1, min_sample_size=4), 10, 4, 4),
        (RoundPolicy(fraction=0.1, quorum=3), 10, 3, 3),
        (RoundPolicy(max_participants=5, over_selection=1.2), 100, 5, 6),
    ],
)
def test_how_many_updates_a_round_wants_and_how_many_tasks_it_hands_out(
    policy: RoundPolicy, live_count: int, aim: int, ask: int
) -> None:
    assert (policy.aim(live_count), policy.ask(policy.aim(live_count))) == (aim, ask)


@given(percent=st.integers(1, 100), live_count=st.integers(0, 10_000))
def test_the_aim_is_the_exact_ceiling_of_the_fraction(percent: int, live_count: int) -> None:
    aim = RoundPolicy(fraction=percent / 100).aim(live_count)
    assert aim == max(1, -(-percent * live_count // 100))

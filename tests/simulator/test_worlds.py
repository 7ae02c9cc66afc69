"""The production round keeps its promises in hundreds of simulated worlds, each with its own faults."""

from __future__ import annotations

import pytest

from tests.simulator.world import World

SEEDS = range(400)
_BATCH = 50


@pytest.mark.parametrize("first", SEEDS[::_BATCH])
def test_every_invariant_holds_whatever_goes_wrong(first: int) -> None:
    for seed in range(first, first + _BATCH):
        outcome = World(seed).play()
        assert not outcome.violation, f"seed {seed}: {outcome.violation}\n" + "\n".join(outcome.trace)


def test_the_worlds_are_eventful() -> None:
    """A fault injector that injects nothing would pass every test above."""
    outcomes = [World(seed).play() for seed in range(60)]
    assert sum(outcome.crashes for outcome in outcomes) > 200
    assert sum(outcome.rounds for outcome in outcomes) > 200
    assert sum(outcome.abandoned for outcome in outcomes) > 20
    assert sum(outcome.updates for outcome in outcomes) > 400
    assert sum(outcome.stale_updates for outcome in outcomes) > 30
    policies = [World(seed).policy for seed in range(60)]
    assert sum(policy.late == "discard" for policy in policies) > 15
    assert sum(policy.late == "carry" and policy.buffer_size is None for policy in policies) > 5
    assert sum(policy.buffer_size is not None for policy in policies) > 8
    faults = [World(seed).faults for seed in range(60)]
    for kind in ("loss", "duplicate", "clock_drift", "wall_step_s", "failure", "bad_update"):
        assert 15 < sum(getattr(fault, kind) > 0 for fault in faults) < 45, kind


def test_a_seed_tells_the_same_story_every_time() -> None:
    first, second = World(7), World(7)
    assert first.play() == second.play()
    assert first._trace == second._trace

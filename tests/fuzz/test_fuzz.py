"""A few thousand damaged inputs for each change; `make fuzz N=1000000` feeds as many as wanted."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.errors import FedgrpcError
from tests.fuzz.mutate import mutated
from tests.fuzz.registry import TARGETS
from tests.fuzz.run import fuzz

PER_SHARE = 12


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_damaged_input_gives_the_projects_errors_alone_soon_and_in_little_memory(name: str) -> None:
    tally = fuzz(max(40, PER_SHARE * TARGETS[name].share), 0, [name])
    assert not tally.faults, "\n".join(tally.faults)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(TARGETS)), rnd=st.randoms(use_true_random=False))
def test_what_hypothesis_draws_gives_the_projects_errors_alone(
    tmp_path_factory: pytest.TempPathFactory, name: str, rnd: Random
) -> None:
    """The same inputs, drawn so that hypothesis can make a failing one small."""
    try:
        TARGETS[name].run(rnd, tmp_path_factory.mktemp("fuzz"))
    except FedgrpcError:
        return


def test_a_fault_is_told_with_the_seed_and_the_number_that_bring_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(rnd: Random, folder: Path) -> None:
        mutated(b"the input", rnd)
        if rnd.random() < 0.5:
            raise ZeroDivisionError("of all things")

    broken = TARGETS["texts"].__class__("broken", breaks)
    monkeypatch.setitem(TARGETS, "broken", broken)
    tally = fuzz(8, 3, ["broken"])
    assert 0 < len(tally.faults) < 8
    number = int(tally.faults[0].split("--at ")[1])
    assert "ZeroDivisionError" in tally.faults[0]
    assert "input: " in tally.faults[0]
    assert "nothing" not in tally.faults[0]
    assert fuzz(1, 3, ["broken"], start=number).faults == tally.faults[:1]

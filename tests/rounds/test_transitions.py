"""Every pair of phase and event is either handled or raises the right error, and then nothing has happened."""

from __future__ import annotations

import typing
from itertools import product

import pytest

from fedgrpc.errors import FedgrpcError, IllegalTransition, RoundClosed, UnknownTask
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Committed,
    Event,
    Failed,
    Progress,
    Rejected,
    Selected,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.transitions import step
from tests.support.round_scenario import Scenario

KNOWN: dict[type, Event] = {
    WorkersAvailable: WorkersAvailable((), 0),
    Selected: Selected(()),
    Progress: Progress("c", TaskPhase.TRAINING),
    Accepted: Accepted("c"),
    Rejected: Rejected("c", "NaN"),
    Failed: Failed("c", "out of memory"),
    Tick: Tick(),
    Committed: Committed(2),
    Abort: Abort("stopped"),
}
UNKNOWN = [Progress("z", TaskPhase.TRAINING), Accepted("z"), Rejected("z", "NaN"), Failed("z", "out of memory")]

S, R, C, D, A = RoundPhase
HANDLED = {
    *product([S, R], [WorkersAvailable, Selected, Tick, Abort]),
    *product([R], [Progress, Accepted, Rejected, Failed]),
    *product([C], [WorkersAvailable, Selected, Tick, Abort, Committed]),
    *product([D, A], [WorkersAvailable, Selected, Tick]),
}
RAISES: dict[tuple[RoundPhase, type], type[FedgrpcError]] = {
    **dict.fromkeys(product([S], [Progress, Accepted, Rejected, Failed]), UnknownTask),
    **dict.fromkeys(product([C, D, A], [Progress, Accepted, Rejected, Failed]), RoundClosed),
    **dict.fromkeys(product([S, R, D, A], [Committed]), IllegalTransition),
    **dict.fromkeys(product([D, A], [Abort]), IllegalTransition),
}


def _in_phase(phase: RoundPhase) -> Scenario:
    """A round in that phase, with an answer to `Select` outstanding where that can be."""
    scenario = Scenario(RoundPolicy(max_participants=2, over_selection=1.5))
    if phase is S:
        scenario.pool("abc")
        return scenario
    scenario.open("abc")
    if phase is R:
        scenario.fail("a")
        scenario.fail("b")
        scenario.pool("d")
        return scenario
    scenario.accept("ab")
    if phase is D:
        scenario.commit()
    elif phase is A:
        scenario.abort()
    return scenario


def test_the_table_below_names_every_pair_of_phase_and_event() -> None:
    assert set(KNOWN) == set(typing.get_args(Event))
    assert HANDLED | RAISES.keys() == set(product(RoundPhase, KNOWN))
    assert not HANDLED & RAISES.keys()


@pytest.mark.parametrize(("phase", "kind"), sorted(HANDLED, key=str), ids=str)
def test_an_event_that_the_phase_allows_is_handled(phase: RoundPhase, kind: type) -> None:
    scenario = _in_phase(phase)
    assert scenario.round.phase is phase
    scenario.send(KNOWN[kind])


@pytest.mark.parametrize(("phase", "kind"), sorted(RAISES, key=str), ids=str)
def test_an_event_that_the_phase_does_not_allow_raises_and_nothing_has_happened(
    phase: RoundPhase, kind: type
) -> None:
    scenario = _in_phase(phase)
    before = scenario.round
    with pytest.raises(RAISES[phase, kind]) as caught:
        scenario.send(KNOWN[kind])
    assert type(caught.value) is RAISES[phase, kind]
    assert scenario.round == before


@pytest.mark.parametrize("phase", RoundPhase)
@pytest.mark.parametrize("event", UNKNOWN, ids=lambda event: type(event).__name__)
def test_a_token_of_no_task_is_unknown_in_every_phase(phase: RoundPhase, event: Event) -> None:
    scenario = _in_phase(phase)
    with pytest.raises(UnknownTask):
        scenario.send(event)


@pytest.mark.parametrize("phase", RoundPhase)
def test_a_step_changes_nothing_in_the_round_it_was_given(phase: RoundPhase) -> None:
    scenario = _in_phase(phase)
    before, tasks = scenario.round, dict(scenario.round.tasks)
    for kind, event in KNOWN.items():
        if (phase, kind) in HANDLED:
            step(before, event, scenario.now + 1e6)
            assert before == scenario.round
            assert before.tasks == tasks


@pytest.mark.parametrize("phase", [C, D, A])
def test_to_accept_an_update_again_changes_nothing(phase: RoundPhase) -> None:
    scenario = _in_phase(phase)
    before = scenario.round
    assert scenario.send(Accepted("a")) == ()
    assert scenario.round == before


@pytest.mark.parametrize("phase", [C, D, A])
@pytest.mark.parametrize("kind", [WorkersAvailable, Selected, Tick])
def test_news_of_the_fleet_and_the_time_change_nothing_in_a_closed_round(phase: RoundPhase, kind: type) -> None:
    scenario = _in_phase(phase)
    before = scenario.round
    assert scenario.send(KNOWN[kind]) == ()
    assert scenario.round == before

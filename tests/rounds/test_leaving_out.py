"""An accepted update that the commit cannot average is left out, and the round goes on with the others."""

from __future__ import annotations

import pytest

from fedgrpc.errors import RoundClosed
from fedgrpc.rounds.events import Commit, Finished, Rejected, TaskPhase
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase
from tests.support.round_scenario import Scenario


def _committing(quorum: int) -> Scenario:
    scenario = Scenario(RoundPolicy(min_workers=3, quorum=quorum, selection_window_s=0.0)).open("abc")
    for token in "abc":
        scenario.accept(token)
    assert scenario.round.phase is RoundPhase.COMMITTING
    return scenario


def test_the_others_are_committed_where_they_are_a_quorum() -> None:
    scenario = _committing(quorum=2)
    assert scenario.send(Rejected("b", "the mean would not be finite")) == (Commit(("a", "c")),)
    assert scenario.round.find("b").phase is TaskPhase.REJECTED
    assert scenario.round.find("b").reason == "the mean would not be finite"


def test_without_a_quorum_the_round_is_abandoned_and_says_why() -> None:
    scenario = _committing(quorum=2)
    scenario.send(Rejected("b", "one"))
    (finished,) = scenario.send(Rejected("c", "two"))
    assert isinstance(finished, Finished)
    assert not finished.committed
    assert "1 of 2 needed updates: two" in finished.reason
    assert scenario.round.phase is RoundPhase.ABANDONED


def test_an_update_is_left_out_once() -> None:
    scenario = _committing(quorum=1)
    scenario.send(Rejected("b", "one"))
    before = scenario.round
    with pytest.raises(RoundClosed):
        scenario.send(Rejected("b", "again"))
    assert scenario.round is before

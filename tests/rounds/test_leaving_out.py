"""An accepted update that the commit cannot average is left out, and the round goes on with the others."""

from __future__ import annotations

import pytest

from fedgrpc.errors import RoundClosed
from fedgrpc.rounds.events import Commit, Finished, Rejected, TaskPhase
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import RoundPhase
from tests.support.round_scenario import Scenario


def _committing(quorum: int) -> Scenario:
    it = Scenario(RoundPolicy(min_workers=3, quorum=quorum, selection_window_s=0.0)).open("abc")
    for token in "abc":
        it.accept(token)
    assert it.round.phase is RoundPhase.COMMITTING
    return it


def test_the_others_are_committed_where_they_are_a_quorum() -> None:
    it = _committing(quorum=2)
    assert it.send(Rejected("b", "the mean would not be finite")) == (Commit(("a", "c")),)
    assert it.round.find("b").phase is TaskPhase.REJECTED
    assert it.round.find("b").reason == "the mean would not be finite"


def test_without_a_quorum_the_round_is_abandoned_and_says_why() -> None:
    it = _committing(quorum=2)
    it.send(Rejected("b", "one"))
    (finished,) = it.send(Rejected("c", "two"))
    assert isinstance(finished, Finished)
    assert not finished.committed
    assert "1 of 2 needed updates: two" in finished.reason
    assert it.round.phase is RoundPhase.ABANDONED


def test_an_update_is_left_out_once() -> None:
    it = _committing(quorum=1)
    it.send(Rejected("b", "one"))
    before = it.round
    with pytest.raises(RoundClosed):
        it.send(Rejected("b", "again"))
    assert it.round is before

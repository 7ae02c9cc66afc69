"""A round's record: how long it has been open."""

import asyncio
import time

from fedgrpc.protocol.rounds import record_of
from fedgrpc.rounds.policy import RoundPolicy, TaskKind
from fedgrpc.rounds.round import Round
from fedgrpc.runs.round_in_progress import RoundInProgress
from tests.support.running_federation import running_aggregator


def test_a_wall_clock_that_was_set_does_not_change_how_long_a_round_took() -> None:
    """The aggregator's own clock may be that of a board without a battery, set by the network in the round."""
    state = Round(1, RoundPolicy(), opened_at=100.0)
    in_1970 = RoundInProgress(state, TaskKind.TRAIN, 1, started_at=60.0)
    assert record_of(in_1970, 103.5).duration_seconds == 3.5
    assert record_of(in_1970, 103.5).started_at.seconds == 60


async def test_a_round_that_is_resumed_has_been_open_before(tmp_path):
    async with running_aggregator(tmp_path) as running:
        a, b = await running.device("a"), await running.device("b")
        await asyncio.gather(a.task(), b.task())
        started_at = (await running.round()).started_at.ToNanoseconds() / 1e9
    before_s = time.time() - started_at
    async with running_aggregator(tmp_path) as running:
        assert (await running.round()).duration_seconds >= before_s - 0.001
        running.pass_time(50)
        assert (await running.round()).duration_seconds >= before_s + 49.999

"""Answers that many ask for are made once; long ones leave time for everybody else."""

import asyncio
import math
import time

import pytest

from fedgrpc.aggregator import views
from fedgrpc.aggregator.views import Pieces, Watching, watch_interval_s
from fedgrpc.errors import Exhausted
from fedgrpc.v1 import aggregator_pb2 as pb


class Source:
    def __init__(self):
        self.revision = 0
        self.made = 0

    def make(self):
        self.made += 1
        return pb.WatchRoundsResponse(run=pb.Run(current_round=self.revision))


@pytest.fixture
def source():
    return Source()


def test_a_message_is_made_once_for_all_who_ask_at_the_same_time(source, monkeypatch):
    monkeypatch.setattr(views, "_SHARED_S", 600.0)
    shared = Watching(source.make, lambda: source.revision)
    shared._made_at = -1e9
    first = shared.latest()
    source.revision = 7
    assert [shared.latest() for _ in range(100)] == [first] * 100
    assert source.made == 1
    assert shared.latest(fresh=True)[0] == 7
    assert source.made == 2


def test_a_message_says_which_revision_it_is_of_so_that_none_is_missed(source, monkeypatch):
    monkeypatch.setattr(views, "_SHARED_S", 0.0)
    shared = Watching(source.make, lambda: source.revision)
    for revision in (0, 1, 5):
        source.revision = revision
        seen, message = shared.latest()
        assert seen == pb.WatchRoundsResponse.FromString(message).run.current_round == revision


def test_too_many_watchers_and_too_many_of_one_connection_are_told_to_come_again(source, monkeypatch):
    monkeypatch.setattr(views, "_MAX_OF_ONE_PEER", 2)
    monkeypatch.setattr(views, "_MAX_WATCHERS", 3)
    shared = Watching(source.make, lambda: source.revision)
    with shared.watcher("a"), shared.watcher("a"):
        with pytest.raises(Exhausted) as caught, shared.watcher("a"):
            pass
        assert caught.value.retry_after_s
        with shared.watcher("b"), pytest.raises(Exhausted), shared.watcher("c"):
            pass
    with shared.watcher("a"), shared.watcher("b"), shared.watcher("c"):
        pass
    assert not shared._watchers


async def test_long_lists_are_made_one_after_the_other_and_leave_half_of_the_time():
    pieces, at_once, ticks = Pieces(), set(), 0

    def slow(name):
        for number in range(200):
            at_once.add(name)
            time.sleep(0.0002)
            yield number
        at_once.discard(name)

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1
            assert len(at_once) <= 1

    ticking = asyncio.create_task(tick())
    lists = await asyncio.gather(*(pieces.list_of(slow(name)) for name in "abc"))
    ticking.cancel()
    assert lists == [list(range(200))] * 3
    assert ticks >= 9


@pytest.mark.parametrize(
    ("rate_hz", "interval_s"),
    [(0.0, 0.25), (-1.0, 0.25), (math.nan, 0.25), (1e-9, 10.0), (5e-324, 10.0), (2.0, 0.5), (math.inf, 0.05)],
)
def test_no_rate_that_a_watcher_asks_for_makes_it_sleep_through_the_end_of_a_run(rate_hz, interval_s):
    assert watch_interval_s(rate_hz) == pytest.approx(interval_s)

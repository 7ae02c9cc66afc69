import asyncio
import threading
import time

import pytest

from fedgrpc.errors import UsageError
from fedgrpc.worker.throttle import Pacer, Throttle


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def test_bytes_take_as_long_as_the_link_says():
    clock = Clock()
    pacer = Pacer(8000, clock)
    assert pacer.delay_s(500) == pytest.approx(0.5)
    assert pacer.delay_s(1000) == pytest.approx(1.5)
    clock.now_s += 1.5
    assert pacer.delay_s(1000) == pytest.approx(1.0)


def test_a_pause_is_not_made_up_for_by_a_burst():
    clock = Clock()
    pacer = Pacer(8000, clock)
    clock.now_s += 3600
    assert pacer.delay_s(1000) == pytest.approx(1.0)


def test_without_a_rate_nothing_waits():
    assert Pacer(None).delay_s(10**12) == 0


async def test_a_wait_is_announced_and_really_waited():
    announced = []
    started_s = time.monotonic()
    await Pacer(80_000).wait(1000, announced.append)
    assert time.monotonic() - started_s >= 0.099
    assert announced == [pytest.approx(0.1, rel=0.05)]


def test_a_slowdown_of_three_rests_twice_the_work():
    started_s = time.monotonic()
    Throttle(slowdown=3).rest(0.05, threading.Event())
    assert 0.099 <= time.monotonic() - started_s < 60


async def test_a_rest_ends_at_once_when_told_to_stop():
    stop = threading.Event()
    rest = asyncio.create_task(asyncio.to_thread(Throttle(slowdown=1000).rest, 60, stop))
    stop.set()
    await asyncio.wait_for(rest, 30)


def test_chunks_shrink_so_that_a_paced_link_still_moves():
    assert Throttle().chunk_bytes(1 << 20) == 1 << 20
    assert Throttle(link_bits_per_second=1e6).chunk_bytes(1 << 20) == 31_250
    assert Throttle(link_bits_per_second=1).chunk_bytes(1 << 20) == 4096


@pytest.mark.parametrize(
    "bad",
    [{"slowdown": 0.5}, {"slowdown": float("nan")}, {"link_bits_per_second": 0}, {"link_bits_per_second": -1}],
)
def test_an_impossible_throttle_is_a_usage_error(bad):
    with pytest.raises(UsageError):
        Throttle(**bad)

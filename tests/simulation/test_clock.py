"""The virtual clock: it moves on, whoever waits for what."""

from __future__ import annotations

import asyncio
import random
from contextlib import closing

from fedgrpc.simulation.learning.clock import VirtualClockLoop


async def _wait_until(loop: VirtualClockLoop, ends_at: float) -> int:
    """Sleep until then, as devices do; return in how many sleeps."""
    sleeps = 0
    while (left_s := ends_at - loop.time()) > 0 and sleeps < 100:
        await asyncio.sleep(left_s)
        sleeps += 1
    return sleeps


async def _wait_in_lockstep(loop: VirtualClockLoop, chance: random.Random) -> int:
    most = 0
    for _ in range(3000):
        # All at one time, or within a nanosecond of it.
        ends_at = loop.time() + chance.uniform(0.001, 1.0)
        times = [ends_at + chance.choice([0.0, 1e-10, 5e-10]) for _ in range(5)]
        most = max(most, *await asyncio.gather(*(_wait_until(loop, each) for each in times)))
    return most


def test_devices_that_end_within_one_nanosecond_do_not_stop_the_clock() -> None:
    """Each slept for the rest of a nanosecond, and found the clock where it was, for as long as another did."""
    with closing(VirtualClockLoop(1e4 / 3)) as loop:
        # One more sleep: a difference of times is rounded.
        assert loop.run_until_complete(_wait_in_lockstep(loop, random.Random(0))) <= 2


def test_a_timer_is_never_early() -> None:
    with closing(VirtualClockLoop(1e4 / 3)) as loop:
        late_by: list[float] = []

        async def wait(chance: random.Random) -> None:
            for _ in range(500):
                future, when = loop.create_future(), loop.time() + chance.random()
                loop.call_at(when, future.set_result, None)
                await future
                late_by.append(loop.time() - when)

        async def all_of_them() -> None:
            await asyncio.gather(*(wait(random.Random(seed)) for seed in range(5)))

        loop.run_until_complete(all_of_them())
        assert min(late_by) >= 0
        assert max(late_by) < 1e-8

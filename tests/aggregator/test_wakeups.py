"""Many polls that are to hear of a task at the same time."""

import asyncio
import itertools

from fedgrpc.aggregator.registry import PacedWakeups


def events(count):
    return [asyncio.Event() for _ in range(count)]


async def test_a_few_are_woken_at_once():
    few, wakeups = events(10), PacedWakeups()
    for event in few:
        wakeups.wake(event)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(event.is_set() for event in few)


async def test_all_of_many_are_woken_in_the_order_in_which_they_came():
    many, wakeups = events(1000), PacedWakeups()
    for event in many:
        wakeups.wake(event)
    counts = []
    async with asyncio.timeout(60):
        while not counts or counts[-1] < 1000:
            await asyncio.sleep(0)
            counts.append(sum(event.is_set() for event in many))
            assert all(event.is_set() for event in many[: counts[-1]])
    steps = sorted({after - before for before, after in itertools.pairwise(counts)} - {0})
    assert min(steps) > 0
    assert max(steps) < 100


async def test_those_who_come_while_others_wait_are_woken_too():
    first, later, wakeups = events(100), events(3), PacedWakeups()
    for event in first:
        wakeups.wake(event)
    await asyncio.sleep(0.01)
    for event in later:
        wakeups.wake(event)
    async with asyncio.timeout(60):
        await asyncio.gather(*(event.wait() for event in [*first, *later]))

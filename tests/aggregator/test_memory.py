"""The bound on the bytes of updates in memory."""

import asyncio

import numpy as np
import pytest

from fedgrpc.aggregator.upload_reader import ByteBudget


async def settled(*tasks):
    for _ in range(3):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_what_fits_is_had_at_once_and_the_rest_waits_its_turn():
    budget = ByteBudget(10)
    await budget.take(6)
    second, third = asyncio.create_task(budget.take(5)), asyncio.create_task(budget.take(1))
    assert await settled(second, third) == [False, False]
    budget.give_back(6)
    assert await settled(second, third) == [True, True]
    assert budget.taken_bytes == 6


async def test_one_who_wants_more_than_there_is_gets_it_alone():
    budget = ByteBudget(10)
    await budget.take(1)
    large = asyncio.create_task(budget.take(100))
    small = asyncio.create_task(budget.take(1))
    assert await settled(large, small) == [False, False]
    budget.give_back(1)
    assert await settled(large, small) == [True, False]
    budget.give_back(100)
    assert await settled(small) == [True]


async def test_one_who_gives_up_waiting_holds_nothing_and_blocks_nobody():
    budget = ByteBudget(10)
    await budget.take(10)
    first, second = asyncio.create_task(budget.take(8)), asyncio.create_task(budget.take(2))
    await settled(first)
    first.cancel()
    await settled(first)
    budget.give_back(10)
    assert await settled(second) == [True]
    assert budget.taken_bytes == 2


async def test_nobody_waits_behind_one_who_has_given_up():
    budget = ByteBudget(10)
    await budget.take(6)
    large, small = asyncio.create_task(budget.take(8)), asyncio.create_task(budget.take(2))
    assert await settled(large, small) == [False, False]
    large.cancel()
    assert await settled(small) == [True]
    # Nothing stays behind of those who come while the room is taken, and leave.
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await budget.take(8)
    await asyncio.wait_for(budget.take(2), 1)
    assert budget.taken_bytes == 10


async def test_one_who_is_cancelled_in_the_moment_of_its_turn_gives_it_back():
    budget = ByteBudget(10)
    await budget.take(10)
    waiting = asyncio.create_task(budget.take(10))
    await settled(waiting)
    budget.give_back(10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.taken_bytes == 0


@pytest.mark.parametrize("seed", range(5))
async def test_any_crowd_stays_within_the_bound_and_leaves_nothing_behind(seed):
    rng = np.random.default_rng(seed)
    budget = ByteBudget(100)
    largest = 0

    async def visitor():
        nonlocal largest
        size = int(rng.integers(1, 60))
        await budget.take(size)
        largest = max(largest, budget.taken_bytes)
        try:
            await asyncio.sleep(float(rng.uniform(0, 0.002)))
        finally:
            budget.give_back(size)

    visitors = [asyncio.create_task(visitor()) for _ in range(200)]
    for victim in rng.choice(200, 40, replace=False):
        await asyncio.sleep(0.0005)
        visitors[victim].cancel()
    async with asyncio.timeout(120):
        await asyncio.gather(*visitors, return_exceptions=True)
    assert 60 < largest <= 100
    assert budget.taken_bytes == 0

import asyncio
import threading
from contextlib import aclosing

import pytest

from fedgrpc.aio import BackgroundThread, Changes, Interrupted, in_thread, prefetched, run_until_interrupted


async def forever():
    await asyncio.Event().wait()
    return "never"


async def value(result):
    return result


async def failure(error):
    raise error


async def test_work_that_ends_first_gives_its_result():
    assert await run_until_interrupted(value(7), forever()) == 7


async def test_an_interrupter_that_ends_first_gives_its_reason():
    with pytest.raises(Interrupted, match="the lease is gone"):
        await run_until_interrupted(forever(), value("the lease is gone"))


@pytest.mark.parametrize("who", ["work", "interrupter"])
async def test_what_either_raises_is_raised(who):
    error = failure(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await (
            run_until_interrupted(error, forever()) if who == "work" else run_until_interrupted(forever(), error)
        )


async def test_both_have_ended_when_it_returns():
    before = asyncio.all_tasks()
    with pytest.raises(Interrupted):
        await run_until_interrupted(forever(), value("stop"))
    assert asyncio.all_tasks() == before


async def test_both_have_ended_when_it_is_cancelled():
    before = asyncio.all_tasks()
    task = asyncio.create_task(run_until_interrupted(forever(), forever()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before


async def test_a_thread_gives_its_result_or_its_exception():
    assert await in_thread(lambda: threading.current_thread().name, threading.Event()) == "fedgrpc-training"
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, threading.Event())


async def test_a_cancelled_thread_is_told_to_stop_and_waited_for():
    stop, ended = threading.Event(), threading.Event()

    def work():
        stop.wait(10)
        ended.set()

    task = asyncio.create_task(in_thread(work, stop))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_thread_that_does_not_stop_is_left_behind_when_cancelled_again():
    release = threading.Event()
    task = asyncio.create_task(in_thread(lambda: release.wait(30), threading.Event()))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    release.set()


def counted(batches):
    """A reader for `prefetched` of so many batches of two, and the numbers of those that were read."""
    read = []

    def next_batch():
        number = len(read)
        read.append(number)
        return [2 * number, 2 * number + 1], number + 1 < batches

    return next_batch, read


async def test_prefetched_items_come_in_order_and_each_batch_is_read_once():
    next_batch, read = counted(3)
    assert [item async for item in prefetched(next_batch)] == [0, 1, 2, 3, 4, 5]
    assert read == [0, 1, 2]


async def test_one_batch_is_read_ahead_and_its_thread_has_ended_when_the_reader_stops():
    next_batch, read = counted(100)
    async with aclosing(prefetched(next_batch)) as items:
        assert await anext(items) == 0
    assert read == [0, 1]


async def test_watchers_wake_at_each_change_and_miss_none_that_came_before_they_waited():
    changes = Changes()
    seen = changes.revision
    changes.notify()
    assert await asyncio.wait_for(changes.wait(seen), 20) == changes.revision
    waiting = [asyncio.create_task(changes.wait(changes.revision)) for _ in range(2)]
    await asyncio.sleep(0)
    changes.notify()
    assert await asyncio.gather(*waiting) == [changes.revision] * 2


def test_a_background_thread_does_calls_in_order_while_two_are_pending_at_most():
    done, released = [], threading.Event()
    with BackgroundThread("test") as thread:
        thread.submit(lambda: released.wait(20))
        thread.submit(done.append, 1)
        assert done == []
        released.set()
        for number in (2, 3):
            thread.submit(done.append, number)
        thread.wait()
        assert done == [1, 2, 3]


def test_what_a_call_in_the_background_raises_is_raised_by_a_later_method_and_its_thread_has_ended():
    with BackgroundThread("test-failing") as thread:
        thread.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            thread.wait()
    assert not any(each.name.startswith("test-failing") for each in threading.enumerate())

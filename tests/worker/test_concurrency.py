import asyncio
import threading

import pytest

from fedgrpc.worker.concurrency import Interrupted, in_thread, unless


async def forever():
    await asyncio.Event().wait()
    return "never"


async def value(result):
    return result


async def failure(error):
    raise error


async def test_work_that_ends_first_gives_its_result():
    assert await unless(value(7), forever()) == 7


async def test_an_interrupter_that_ends_first_gives_its_reason():
    with pytest.raises(Interrupted, match="the lease is gone"):
        await unless(forever(), value("the lease is gone"))


@pytest.mark.parametrize("who", ["work", "interrupter"])
async def test_what_either_raises_is_raised(who):
    error = failure(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await (unless(error, forever()) if who == "work" else unless(forever(), error))


async def test_both_have_ended_when_it_returns():
    before = asyncio.all_tasks()
    with pytest.raises(Interrupted):
        await unless(forever(), value("stop"))
    assert asyncio.all_tasks() == before


async def test_both_have_ended_when_it_is_cancelled():
    before = asyncio.all_tasks()
    task = asyncio.create_task(unless(forever(), forever()))
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

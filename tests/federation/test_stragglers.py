"""Promise 2: "A round ends on time. A slow, silent or trickling worker never holds a round." """

import asyncio
import time

import numpy as np
import pytest

from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import MODEL, PATIENCE_S, chunks, encoded, refused, update_of
from tests.support.running_federation import running_aggregator

ACCEPTED, LATE = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.TASK_PHASE_LATE
FAILED, EXPIRED = round_pb2.TASK_PHASE_FAILED, round_pb2.TASK_PHASE_EXPIRED


async def fleet(running, *names):
    """Registered devices and the tasks that came to them."""
    devices = [await running.device(name) for name in names]
    return devices, await asyncio.gather(*(device.task() for device in devices))


async def until(condition):
    """Look until it is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a folder wakes nobody
            await asyncio.sleep(0.01)


def tasks_of(round_):
    return {task.worker: task for task in round_.tasks}


def assert_model(running, version, change):
    np.testing.assert_allclose(running.weights(version)["w"], MODEL["w"] + change, rtol=1e-6)


async def test_a_straggler_misses_the_deadline_and_the_round_is_committed_without_it(tmp_path):
    async with running_aggregator(tmp_path, policy={"deadline_s": 100.0}) as running:
        (quick, slow), (quick_task, slow_task) = await fleet(running, "quick", "slow")
        assert (await quick.push(quick_task)).complete
        assert 0 < (await slow.beat(slow_task)).time_left.ToTimedelta().total_seconds() <= 100
        running.pass_time(100)
        await running.until_finished()
        late = tasks_of(await running.round())["slow"]
        assert late.phase == LATE
        assert late.reason.startswith("slow training: deadline of 100 s passed")
        answer = await slow.beat(slow_task)
        assert (answer.cancel, "late" in answer.reason) == (True, True)
        with refused("FAILED_PRECONDITION", "the task is late", "RoundClosed"):
            await slow.push(slow_task, update_of(100.0))
        with refused("FAILED_PRECONDITION", "the task is late", "RoundClosed"):
            await slow.held(slow_task)
        assert_model(running, 2, 1.0)


async def test_a_trickling_upload_does_not_hold_the_round(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (quick, slow), (quick_task, slow_task) = await fleet(running, "quick", "slow")
        manifest, payload = encoded(update_of(100.0))
        stream = ClientStream(slow.stub.PushUpdate())
        assert await stream.write(pb.PushUpdateRequest(header=slow.header(slow_task, manifest)))

        async def trickle():
            for message in chunks(payload, chunk_bytes=10):
                if not await stream.write(message):
                    return
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        assert (await quick.push(quick_task)).complete
        await slow.until_held(slow_task, 10)
        running.pass_time(600)
        await running.until_finished()
        assert "slow upload" in tasks_of(await running.round())["slow"].reason
        await trickling
        with refused("FAILED_PRECONDITION", "", "RoundClosed"):
            await stream.finish()
        assert_model(running, 2, 1.0)


async def test_a_round_without_its_quorum_is_abandoned_with_the_model_unchanged_and_the_run_goes_on(tmp_path):
    async with running_aggregator(tmp_path, policy={"quorum": 2}) as running:
        (one, two), (task, _) = await fleet(running, "one", "two")
        assert (await one.push(task, update_of(100.0))).complete
        running.pass_time(600)
        abandoned = await running.until_ended(1)
        assert abandoned.phase == round_pb2.ROUND_PHASE_ABANDONED
        assert "1 of 2 needed updates: deadline of 600 s passed" in abandoned.reason
        assert (abandoned.base_version, abandoned.committed_version, (await running.run()).model_version) == (
            1,
            0,
            1,
        )
        first, second = await asyncio.gather(one.task(), two.task())
        assert {first.round, second.round} == {2}
        await asyncio.gather(one.push(first), two.push(second))
        await running.until_finished()
        assert_model(running, 2, 1.0)


async def test_a_worker_that_is_not_heard_of_loses_its_slot_and_is_replaced(tmp_path):
    policy = {"min_sample_size": 2, "max_participants": 2}
    async with running_aggregator(tmp_path, policy=policy) as running:
        devices, tasks = await fleet(running, "a", "b")
        spare = await running.device("spare")
        reply = asyncio.create_task(spare.task())
        assert (await devices[0].push(tasks[0])).complete
        await running.until_polling("spare")
        running.pass_time(300)
        assert (await spare.push(await reply, update_of(3.0))).complete
        await running.until_finished()
        seen = tasks_of(await running.round())
        assert seen["b"].phase == EXPIRED
        assert seen["b"].reason == "no-show: not heard of for 300 s"
        assert {seen["a"].phase, seen["spare"].phase} == {ACCEPTED}
        assert_model(running, 2, 2.0)


async def test_a_worker_whose_lease_ran_out_comes_back_with_its_update(tmp_path):
    async with running_aggregator(tmp_path, policy={"quorum": 2}) as running:
        (one, two), (first, second) = await fleet(running, "one", "two")
        running.pass_time(300)
        await running.until_task("two", EXPIRED)
        assert (await one.push(first)).complete
        assert not (await two.beat(second)).cancel
        assert (await running.round()).tasks[1].phase == round_pb2.TASK_PHASE_TRAINING
        assert (await two.push(second, update_of(3.0))).complete
        await running.until_finished()
        assert_model(running, 2, 2.0)


async def test_a_poll_while_holding_a_task_gives_the_same_task_again(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (one, two), (first, second) = await fleet(running, "one", "two")
        again = await one.task()
        assert (again.token, again.round, again.seed) == (first.token, first.round, first.seed)
        await asyncio.gather(one.push(first), two.push(second))
        await running.until_finished()


async def test_more_are_asked_than_are_needed_and_the_surplus_is_told_to_stop(tmp_path):
    policy = {"min_workers": 3, "max_participants": 2, "over_selection": 1.5}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (a, b, c), tasks = await fleet(running, "a", "b", "c")
        assert not (await c.beat(tasks[2])).cancel
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1], update_of(3.0)))
        await running.until_finished()
        surplus = tasks_of(await running.round())["c"]
        assert (surplus.phase, surplus.reason) == (LATE, "slow training: enough updates are in")
        assert (await c.beat(tasks[2])).cancel
        assert_model(running, 2, 2.0)


async def test_a_task_given_back_is_replaced_and_its_reason_kept(tmp_path):
    policy = {"min_sample_size": 2, "max_participants": 2}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        spare = await running.device("spare")
        reply = asyncio.create_task(spare.task())
        for _ in range(2):
            await b.give_back(tasks[1], "the battery\n is low")
        await asyncio.gather(a.push(tasks[0]), spare.push(await reply, update_of(3.0)))
        await running.until_finished()
        given_back = tasks_of(await running.round())["b"]
        assert (given_back.phase, given_back.reason) == (FAILED, "the battery is low")
        with refused("FAILED_PRECONDITION", "the task is failed", "RoundClosed"):
            await b.push(tasks[1])
        await b.give_back(tasks[1])
        await a.give_back(tasks[0])
        assert_model(running, 2, 2.0)


async def test_a_round_ends_at_once_when_nobody_is_left_to_wait_for(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        assert (await a.push(tasks[0])).complete
        await b.give_back(tasks[1])
        await running.until_finished()
        assert_model(running, 2, 1.0)


async def test_a_worker_that_joins_late_takes_part_in_the_next_round(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        late = await running.device("late")
        waiting = asyncio.create_task(late.task())
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        a_task, b_task, late_task = await asyncio.gather(a.task(), b.task(), waiting)
        assert late_task.round == 2
        await asyncio.gather(a.push(a_task), b.push(b_task), late.push(late_task, update_of(4.0)))
        await running.until_finished()
        assert len((await running.round()).tasks) == 3
        assert_model(running, 3, 1.0 + 2.0)


async def test_a_fraction_of_the_workers_takes_part(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 4, "fraction": 0.5}) as running:
        devices = [await running.device(name) for name in "abcd"]
        polls = [asyncio.create_task(device.task()) for device in devices]
        done, waiting = set(), set(polls)
        while len(done) < 2:
            came, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done |= came
        assert len(done) == 2
        pairs = [(device, poll.result()) for device, poll in zip(devices, polls, strict=True) if poll in done]
        await asyncio.gather(*(device.push(task) for device, task in pairs))
        await running.until_finished()
        for poll in waiting:
            poll.cancel()
        assert len((await running.round()).tasks) == 2


async def test_rounds_that_fail_at_once_do_not_spin(tmp_path):
    """A fleet that gives every task back in no time costs a few rounds a second, not thousands."""
    async with running_aggregator(tmp_path, policy={"min_workers": 1}) as running:
        device = await running.device("hasty")
        begun, given_back = time.monotonic(), 0
        while time.monotonic() < begun + 2.0 or given_back < 2:
            if (reply := await device.poll(0.2)).HasField("task"):
                await device.give_back(reply.task)
                given_back += 1
        assert given_back <= 15 * (time.monotonic() - begun)


async def silent_upload(running, device, task, messages):
    """A stream of the header and so many chunks, once it has the slot; and then nothing more."""
    manifest, payload = encoded(update_of(3.0))
    call = device.stub.PushUpdate()
    await call.write(pb.PushUpdateRequest(header=device.header(task, manifest)))
    for message in chunks(payload)[:messages]:
        await call.write(message)
    await device.until_held(task, 2048 * messages)
    await until(running.running_uploads)
    return call


async def test_where_every_upload_slot_is_taken_others_are_told_when_to_try_again(tmp_path):
    async with running_aggregator(tmp_path, policy={"quorum": 2}, max_uploads=1) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        assert not (await a.held(tasks[0])).HasField("retry_after")
        silent = await silent_upload(running, b, tasks[1], 1)
        with refused("RESOURCE_EXHAUSTED", "1 uploads are running; try again in", "Exhausted") as refusal:
            await a.push(tasks[0])
        assert int(refusal.trailers["grpc-retry-pushback-ms"]) > 0
        assert (await a.held(tasks[0])).retry_after.ToNanoseconds() > 0
        # The upload that runs is b's own: a new stream of it would take over.
        assert not (await b.held(tasks[1])).HasField("retry_after")
        silent.cancel()


@pytest.mark.parametrize("messages", [0, 1])
async def test_a_silent_stream_gives_up_its_upload_slot(tmp_path, messages):
    async with running_aggregator(tmp_path, policy={"lease_s": 1.0, "quorum": 2}, max_uploads=1) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        silent = await silent_upload(running, b, tasks[1], messages)
        with refused("UNAVAILABLE", "no byte came for 1 s", "LinkError"):
            await silent
        await a.push(tasks[0])
        assert (await b.push(tasks[1], update_of(3.0), offset=2048 * messages)).complete
        await running.until_finished()
        assert_model(running, 2, 2.0)


async def test_a_second_stream_takes_over_from_one_that_hangs(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        manifest, payload = encoded(update_of(3.0))
        hanging = b.stub.PushUpdate()
        await hanging.write(pb.PushUpdateRequest(header=b.header(tasks[1], manifest)))
        await hanging.write(chunks(payload)[0])
        await b.until_held(tasks[1], 2048)
        assert (await b.push(tasks[1], update_of(3.0), offset=2048)).complete
        assert (await a.push(tasks[0])).complete
        await running.until_finished()
        hanging.cancel()
        assert_model(running, 2, 2.0)


async def test_silent_streams_take_no_memory_from_those_that_send(tmp_path):
    """Four that open an upload and say nothing, where there is memory for one chunk of each."""
    policy = {"min_workers": 5, "quorum": 1}
    async with running_aggregator(tmp_path, policy=policy, max_upload_memory_bytes=4 * 16384) as running:
        (good, *silent), (good_task, *tasks) = await fleet(running, "good", "s1", "s2", "s3", "s4")
        manifest, _ = encoded(update_of(100.0))
        calls = [device.stub.PushUpdate() for device in silent]
        for device, task, call in zip(silent, tasks, calls, strict=True):
            await call.write(pb.PushUpdateRequest(header=device.header(task, manifest)))
        await until(lambda: len(running.running_uploads()) == 4)
        # They would have it for as long as a lease, which is longer than a push waits here.
        assert (await good.push(good_task)).complete
        for call in calls:
            call.cancel()


async def test_a_heartbeat_after_acceptance_never_cancels_not_even_once_the_round_is_over(tmp_path):
    """The acknowledgement may be lost: a worker told to stop would drop an update that counts."""
    async with running_aggregator(tmp_path, policy={"min_workers": 2}, rounds=2) as running:
        a, b = await running.device("a"), await running.device("b")
        first, second = await asyncio.gather(a.task(), b.task())
        await a.push(first)
        assert not (await a.beat(first)).cancel
        await b.push(second)
        await running.until_ended(1)
        assert not (await a.beat(first)).cancel

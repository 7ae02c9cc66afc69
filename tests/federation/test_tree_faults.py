"""What a tree survives: an aggregator below killed in any state, the one above killed, a round below that comes to
nothing, and one that is too slow. The devices are played by hand.
"""

import asyncio
import signal
from contextlib import AsyncExitStack

import numpy as np
import pytest

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import MODEL, PATIENCE_S, chunks, encoded, update_of
from tests.support.processes import aggregator_process, free_address, reconnected
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.running_hierarchy import leaf_process, running_leaf

pytestmark = pytest.mark.faults

ACCEPTED, FAILED = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.TASK_PHASE_FAILED
LATE = round_pb2.TASK_PHASE_LATE


async def at_work(*devices):
    """The task of each, however many polls it takes: who polls here may have to wait for who polls there."""

    async def task_of(device):
        while not (reply := await device.poll()).HasField("task"):
            assert not reply.run_ended
        return reply.task

    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*map(task_of, devices))


async def devices_of(running, *names):
    return [await running.device(name) for name in names]


def phases(record):
    return {task.worker: task.phase for task in record.tasks}


async def test_an_aggregator_below_that_is_killed_goes_on_in_the_same_round_and_nothing_counts_twice(tmp_path):
    """Killed: with one of two updates accepted, and with its mean made and not yet taken above."""
    async with running_aggregator(tmp_path, max_uploads=1, policy={"quorum": 2}) as root:
        async with leaf_process(tmp_path, "leaf", root.address) as (process, leaf):
            address = leaf.address
            direct, (x, y) = await root.device("direct"), await devices_of(leaf, "x", "y")
            task, x_task, y_task = await at_work(direct, x, y)
            assert x_task.round == task.round == 1
            assert (await x.push(x_task, update_of(1.0), example_count=30)).complete
            await process.kill()

        async with leaf_process(tmp_path, "leaf", root.address, address=address) as (process, leaf):
            x, y = reconnected(leaf, x, y)
            assert (await x.held(x_task)).complete
            assert (await x.push(x_task, update_of(1.0), example_count=30)).complete
            assert (await y.task()).token == y_task.token
            # The only slot for uploads above is taken, so that the mean stays where it is.
            manifest, payload = encoded(update_of(0.0))
            blocking = direct.stub.PushUpdate()
            await blocking.write(pb.PushUpdateRequest(header=direct.header(task, manifest, example_count=40)))
            first, *_ = chunks(payload)
            await blocking.write(first)
            await direct.until_held(task, len(first.chunk.data))
            assert (await y.push(y_task, update_of(5.0), example_count=10)).complete
            await process.until("upload waits for a slot")
            await process.kill()
            blocking.cancel()

        async with leaf_process(tmp_path, "leaf", root.address, address=address) as (process, _):
            await process.until("update acknowledged")
            offset = (await direct.held(task)).committed_size_bytes
            await direct.push(task, update_of(0.0), offset=offset, example_count=40)
            await root.until_finished()
            (record,) = await root.rounds()
            mean = next(item for item in record.tasks if item.worker == "leaf")
            assert (mean.phase, mean.example_count, mean.merged_updates) == (ACCEPTED, 40, 2)
            # (30 x 1 + 10 x 5 + 40 x 0) / 80
            np.testing.assert_allclose(root.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)
            assert await process.ended() == 0


async def test_a_round_below_goes_on_while_the_aggregator_above_is_killed_and_started_again(tmp_path):
    address, arguments = free_address(), ["--rounds", 2, "--min-workers", 1, "--encoding", "raw"]
    async with (
        aggregator_process(tmp_path, *arguments, address=address) as (process, _),
        running_leaf(tmp_path / "leaf", "leaf", address) as leaf,
    ):
        x, y = await devices_of(leaf, "x", "y")
        x_task, y_task = await at_work(x, y)
        await x.push(x_task, update_of(1.0))
        await process.kill()
        await y.push(y_task, update_of(3.0))
        assert (await leaf.until_ended(1)).phase == round_pb2.ROUND_PHASE_COMMITTED
        async with aggregator_process(tmp_path, *arguments, address=address) as (_, root):
            tasks = await at_work(x, y)
            assert {(task.round, task.model_version) for task in tasks} == {(2, 2)}
            await asyncio.gather(*(device.push(task) for device, task in zip((x, y), tasks, strict=True)))
            await root.until_finished()
            assert {(await device.poll(10.0)).run_ended for device in (x, y)} == {True}
            assert await leaf.task == 0
            assert [phases(record) for record in await root.rounds()] == [{"leaf": ACCEPTED}] * 2
            np.testing.assert_allclose(root.weights(3)["w"], MODEL["w"] + 3, rtol=1e-6)


async def test_a_round_below_without_its_quorum_is_a_failure_above_and_nothing_more(tmp_path):
    async with (
        running_aggregator(tmp_path, rounds=2) as root,
        running_leaf(tmp_path / "leaf", "leaf", root, policy={"quorum": 2, "deadline_s": 200.0}) as leaf,
    ):
        direct, (x, y) = await root.device("direct"), await devices_of(leaf, "x", "y")
        task, x_task, _ = await at_work(direct, x, y)
        await x.push(x_task, update_of(7.0))
        leaf.pass_time(200)
        failed = await root.until_task("leaf", FAILED)
        assert "its own round was abandoned: 1 of 2 needed updates" in failed.reason
        await direct.push(task, update_of(1.0))
        # The round after it is one as any other.
        task, *tasks = await at_work(direct, x, y)
        for device, given in zip((direct, x, y), (task, *tasks), strict=True):
            await device.push(given, update_of(2.0))
        await root.until_finished()
        np.testing.assert_allclose(root.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)
        np.testing.assert_allclose(root.weights(3)["w"], MODEL["w"] + 3, rtol=1e-6)


async def test_an_aggregator_below_that_hangs_is_late_without_harm(tmp_path):
    async with (
        running_aggregator(tmp_path, rounds=2) as root,
        leaf_process(tmp_path, "leaf", root.address, "--heartbeat-interval", "200ms") as (process, leaf),
    ):
        direct, (x, y) = await root.device("direct"), await devices_of(leaf, "x", "y")
        task, *_ = await at_work(direct, x, y)
        process.send(signal.SIGSTOP)
        await direct.push(task, update_of(1.0))
        root.pass_time(600)
        assert phases(await root.until_ended(1)) == {"leaf": LATE, "direct": ACCEPTED}
        process.send(signal.SIGCONT)
        # It hears of it by and by; until then its workers are still at the first task.
        await leaf.until_ended(1)
        task, *tasks = await at_work(direct, x, y)
        assert {given.round for given in (task, *tasks)} == {2}
        for device, given in zip((direct, x, y), (task, *tasks), strict=True):
            await device.push(given, update_of(2.0))
        await root.until_finished()
        np.testing.assert_allclose(root.weights(3)["w"], MODEL["w"] + 3, rtol=1e-6)


async def test_a_round_below_ends_when_the_one_above_has_enough(tmp_path):
    """Its workers are told to stop, and take part in the next round."""
    policy = {"max_participants": 1, "over_selection": 2.0}
    async with (
        running_aggregator(tmp_path, rounds=2, policy=policy, heartbeat_interval_s=0.2) as root,
        running_leaf(tmp_path / "leaf", "leaf", root) as leaf,
    ):
        direct, (x, y) = await root.device("direct"), await devices_of(leaf, "x", "y")
        task, x_task, _ = await at_work(direct, x, y)
        await x.push(x_task, update_of(7.0))
        await direct.push(task, update_of(1.0))
        record = await leaf.until_ended(1)
        assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
        assert "no longer wants it" in record.reason
        _, *tasks = await at_work(direct, x, y)
        for device, given in zip((x, y), tasks, strict=True):
            await device.push(given, update_of(2.0))
        await root.until_finished()
        assert [phases(record) for record in await root.rounds()] == [
            {"direct": ACCEPTED, "leaf": LATE},
            {"direct": LATE, "leaf": ACCEPTED},
        ]
        np.testing.assert_allclose(root.weights(3)["w"], MODEL["w"] + 3, rtol=1e-6)


async def test_another_run_above_begins_anew_below(tmp_path):
    """Versions and rounds of one run mean nothing in another: its folder goes, and workers register again."""
    above, below = free_address(), {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    policy = {"min_workers": 1}
    about = {"address": above, "policy": policy, "rounds": 1, "stay": True}
    async with AsyncExitStack() as stack:
        # More than can be played before somebody looks.
        first = running_aggregator(tmp_path / "first", **{**about, "rounds": 10_000})
        async with first as root:
            leaf = await stack.enter_async_context(
                running_leaf(tmp_path / "leaf", "leaf", above, address=free_address(), policy=policy)
            )
            worker = start_worker(leaf, tmp_path, "pi", ShiftTrainer(examples=3))
            await root.until(lambda run, _: run.model_version >= 2)
            below["first"] = (await leaf.run()).id
        async with running_aggregator(tmp_path / "second", **about) as root:
            await root.until_finished()
            assert await asyncio.wait_for(worker, PATIENCE_S) == 0
            assert await asyncio.wait_for(leaf.task, PATIENCE_S) == 0
            below["second"] = (await root.run()).id
            np.testing.assert_allclose(root.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)
    assert below["first"] != below["second"]
    assert [path.name for path in (tmp_path / "leaf" / "aggregator").glob("run-*")] == [f"run-{below['second']}"]

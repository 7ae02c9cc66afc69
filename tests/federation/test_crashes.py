"""Promise 4: "kill -9 the aggregator at any instant: it restarts into the same round with the same accepted
updates." And promise 3: what a worker has trained outlives the worker.
"""

import asyncio
import os
import random
import signal

import grpc
import numpy as np
import pytest

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import MODEL, PATIENCE_S, chunks, encoded, update_of
from tests.support.learning_tasks import Recorded
from tests.support.processes import aggregator_process, free_address, reconnected, worker_process
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

ACCEPTED = round_pb2.TASK_PHASE_ACCEPTED
RNG = np.random.default_rng(11)
UPDATES = {
    (name, number): {
        "w": RNG.normal(size=(50, 40)).astype(np.float32),
        "b": RNG.normal(size=40).astype(np.float32),
        "n": np.array(number),
    }
    for name in "ab"
    for number in range(1, 6)
}
COUNTS = {"a": 10, "b": 31}
PATIENT = {"quorum": 2}


async def push(device, task, offset=0):
    return await device.push(
        task, UPDATES[device.name, task.round], offset=offset, example_count=COUNTS[device.name]
    )


async def uninterrupted(folder):
    """The last model of the same run when nobody is killed."""
    folder.mkdir()
    async with running_aggregator(folder, rounds=5) as running:
        devices = [await running.device(name) for name in "ab"]
        for _ in range(5):
            tasks = await asyncio.gather(*(device.task() for device in devices))
            await asyncio.gather(*(push(device, task) for device, task in zip(devices, tasks, strict=True)))
        await running.until_finished()
        return (running.settings.data_dir / "models" / "000006.safetensors").read_bytes()


@pytest.mark.faults
async def test_an_aggregator_killed_in_every_round_ends_with_the_model_of_one_that_was_not(tmp_path):
    """Killed: with its tasks out, within an upload, between two acceptances, with the last one, between rounds."""
    kept = tmp_path / "killed"
    kept.mkdir()
    arguments = ["--rounds", 5]
    async with aggregator_process(kept, *arguments) as (process, running):
        a, b = [await running.device(name) for name in "ab"]
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        await process.kill()

    # Tasks are out: they are the same after the restart, whether asked for again or not.
    async with aggregator_process(kept, *arguments) as (process, running):
        a, b = reconnected(running, a, b)
        assert (await a.task()).token == a_task.token
        await asyncio.gather(push(a, a_task), push(b, b_task))
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        assert (a_task.round, (await running.run()).model_version) == (2, 2)
        manifest, payload = encoded(UPDATES["a", 2])
        header = pb.PushUpdateRequest(header=a.header(a_task, manifest, example_count=COUNTS["a"]))
        call = a.stub.PushUpdate()
        for message in (header, *chunks(payload)[:2]):
            await call.write(message)
        await a.until_held(a_task, 2048)
        await process.kill()

    # Within an upload: it goes on at the byte that is held.
    async with aggregator_process(kept, *arguments) as (process, running):
        a, b = reconnected(running, a, b)
        held = (await a.held(a_task)).committed_size_bytes
        assert held in (2048, 4096)
        assert (await push(a, a_task, held)).complete
        await push(b, b_task)
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        assert (await push(a, a_task)).complete
        await process.kill()

    # One of two accepted: it still is, and sending it again counts once.
    async with aggregator_process(kept, *arguments) as (process, running):
        a, b = reconnected(running, a, b)
        round_ = await running.round()
        assert {task.worker: task.phase for task in round_.tasks}["a"] == ACCEPTED
        assert round_.number == 3
        assert (await a.held(a_task)).complete
        assert (await push(a, a_task)).complete
        assert (await push(b, b_task)).complete
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        await push(a, a_task)
        assert (await push(b, b_task)).complete
        await process.kill()

    # With the last acknowledgement: the round is committed, from both updates, whether it was before or is now.
    async with aggregator_process(kept, *arguments) as (process, running):
        a, b = reconnected(running, a, b)
        await running.until(lambda run, _: run.model_version == 5)
        assert {task.phase for task in (await running.round(4)).tasks} == {ACCEPTED}
        assert (await a.held(a_task)).complete
        a_task, b_task = await asyncio.gather(a.task(), b.task())
        await asyncio.gather(push(a, a_task), push(b, b_task))
        await running.until_finished()
        await process.kill()

    # After the end: it stays ended.
    async with aggregator_process(kept, *arguments) as (process, running):
        run = await running.until_finished()
        rounds = await running.rounds()
        assert [item.number for item in rounds] == [1, 2, 3, 4, 5]
        assert [item.committed_version for item in rounds] == [2, 3, 4, 5, 6]
        workers = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert [(item.rounds_selected, item.rounds_accepted) for item in workers] == [(5, 5), (5, 5)]
        assert run.model_version == 6
    killed = (running.settings.data_dir / "models" / "000006.safetensors").read_bytes()
    assert killed == await uninterrupted(tmp_path / "uninterrupted")


@pytest.mark.faults
@pytest.mark.parametrize("seed", [int.from_bytes(os.urandom(2), "little")])
async def test_an_aggregator_killed_at_random_loses_nothing_that_real_workers_have_trained(tmp_path, seed):
    """A seed that fails is in the test's name."""
    rng, rounds = random.Random(seed), 10
    address = free_address()
    trainers = [ShiftTrainer() for _ in range(2)]
    crew = [start_worker(address, tmp_path, f"w{i}", trainer, stall_s=5.0) for i, trainer in enumerate(trainers)]
    for kills_left in reversed(range(4)):
        arguments = ["--rounds", rounds, "--quorum", 2, "--upload-encoding", "raw+zstd"]
        async with aggregator_process(tmp_path, *arguments, address=address) as (_, running):
            if kills_left:
                await asyncio.sleep(rng.uniform(0.1, 1.0))
            else:
                run = await running.until_finished()
                assert await asyncio.wait_for(asyncio.gather(*crew), PATIENCE_S) == [0, 0]
                committed = [item.committed_version for item in await running.rounds()]
    assert run.model_version == rounds + 1
    assert [version for version in committed if version] == list(range(2, rounds + 2))
    weights = running.weights(rounds + 1)
    np.testing.assert_allclose(weights["w"], MODEL["w"] + rounds, rtol=1e-5)
    assert weights["n"] == MODEL["n"] + rounds


@pytest.mark.faults
async def test_a_worker_killed_with_a_finished_update_delivers_the_same_one_after_its_restart(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "wait").touch()
    async with running_aggregator(tmp_path, max_uploads=1, policy=PATIENT) as running:
        hand = await running.device("hand")
        async with worker_process(running, tmp_path, "pi", data) as process:
            task = await hand.task()
            manifest, payload = encoded(update_of(0.0))
            blocking = hand.stub.PushUpdate()
            await blocking.write(pb.PushUpdateRequest(header=hand.header(task, manifest)))
            first, *_ = chunks(payload)
            await blocking.write(first)
            # Only then does the worker come to the upload, and finds the one slot taken.
            await hand.until_held(task, len(first.chunk.data))
            (data / "wait").unlink()
            await process.until("upload waits for a slot")
            assert len(Recorded.changes(data)) == 1
            await process.kill()
        blocking.cancel()
        async with worker_process(running, tmp_path, "pi", data) as process:
            await process.until("update acknowledged")
            offset = (await hand.held(task)).committed_size_bytes
            await hand.push(task, update_of(0.0), offset=offset)
            await running.until_finished()
            assert await process.ended() == 0
        (change,) = Recorded.changes(data)
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + change / 2, rtol=1e-5)


async def test_a_worker_killed_while_it_trains_is_replaced_within_the_round(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "wait").touch()
    policy = {"lease_s": 60.0, "min_sample_size": 2, "max_participants": 2}
    async with running_aggregator(tmp_path, policy=policy, heartbeat_interval_s=0.3) as running:
        hand = await running.device("hand")
        async with worker_process(running, tmp_path, "pi", data) as process:
            await hand.push(await hand.task())
            await running.until_task("pi", round_pb2.TASK_PHASE_TRAINING)
            await process.kill()
            spare = await running.device("spare")
            asking = asyncio.create_task(spare.task())
            await running.until_polling("spare")
            running.pass_time(60)
            await spare.push(await asking)
        await running.until_finished()
        seen = {item.worker: item for item in (await running.round()).tasks}
        assert seen["pi"].phase == round_pb2.TASK_PHASE_EXPIRED
        assert "slow training: not heard of for 60 s" in seen["pi"].reason
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)


@pytest.mark.faults
async def test_a_worker_killed_while_it_trains_gets_its_task_again_after_its_restart(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "wait").touch()
    async with running_aggregator(tmp_path, policy=PATIENT) as running:
        hand = await running.device("hand")
        async with worker_process(running, tmp_path, "pi", data) as process:
            task = await hand.task()
            await running.until_task("pi", round_pb2.TASK_PHASE_TRAINING)
            await process.kill()
        (data / "wait").unlink()
        async with worker_process(running, tmp_path, "pi", data) as process:
            await process.until("update acknowledged")
            await hand.push(task, update_of(0.0))
            await running.until_finished()
        *_, second = Recorded.changes(data)
        assert len((await running.round()).tasks) == 2
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + second / 2, rtol=1e-5)


@pytest.mark.parametrize("ingest", [0, 1])
async def test_sigterm_lets_an_upload_end_and_waits_for_no_poll(tmp_path, ingest):
    async with aggregator_process(tmp_path, "--drain", "5m", "--ingest", ingest) as (process, running):
        a, b = [await running.device(name) for name in "ab"]
        a_task, _ = await asyncio.gather(a.task(), b.task())
        waiting = asyncio.create_task((await running.device("idle")).poll(30))
        manifest, payload = encoded(update_of())
        call = a.stub.PushUpdate()
        await call.write(pb.PushUpdateRequest(header=a.header(a_task, manifest)))
        messages = chunks(payload)
        await call.write(messages[0])
        await a.until_held(a_task, len(messages[0].chunk.data))
        process.send(signal.SIGTERM)
        await process.until("draining")
        for message in messages[1:]:
            await call.write(message)
        await call.done_writing()
        assert (await call).complete
        # Sooner than the drain may take, or this would not wait for so long.
        assert await process.ended() == 128 + signal.SIGTERM
        await asyncio.gather(waiting, return_exceptions=True)
    async with aggregator_process(tmp_path) as (process, running):
        a, b = reconnected(running, a, b)
        assert {item.worker: item.phase for item in (await running.round()).tasks}["a"] == ACCEPTED
        assert (await a.held(a_task)).complete


@pytest.mark.parametrize("ingest", [0, 1])
async def test_a_second_sigterm_ends_at_once(tmp_path, ingest):
    async with aggregator_process(tmp_path, "--drain", "5m", "--ingest", ingest) as (process, running):
        a, b = [await running.device(name) for name in "ab"]
        tasks = await asyncio.gather(a.task(), b.task())
        call = a.stub.PushUpdate()
        await call.write(pb.PushUpdateRequest(header=a.header(tasks[0], encoded(update_of())[0])))
        process.send(signal.SIGTERM)
        await process.until("draining")
        process.send(signal.SIGTERM)
        assert await process.ended() == 128 + signal.SIGTERM
        with pytest.raises(grpc.aio.AioRpcError):
            await call

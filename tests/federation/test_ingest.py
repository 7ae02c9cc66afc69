"""A run behind ingest processes: what is acknowledged counts, whichever of them is killed, and whenever."""

import asyncio
import os
import random
import re
import signal

import grpc
import numpy as np
import pytest

from fedgrpc.codec.digest import digest_of
from fedgrpc.errors import CorruptError, Exhausted, RoundClosed, UpdateRefused, WrongIdentity
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.framing import SIDE_KEY
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2
from fedgrpc.words import ingest_line
from tests.support.hand_driven_device import MODEL, PATIENCE_S, HandDrivenDevice, chunks, encoded, update_of
from tests.support.joining import OUTSIDE, connected, joined, revoke
from tests.support.processes import aggregator_process, free_address, worker_process
from tests.support.running_federation import running_aggregator

ONE = {"min_workers": 1, "selection_window_s": 0.1}


def ingest_of(running):
    return running.aggregator.ingest


async def killed(running):
    """Kill an ingest process, and wait until its successor answers."""
    ingest, before = ingest_of(running), ingest_of(running).restarts
    os.kill(ingest.pids[0], signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while ingest.restarts == before or not ingest.serving_count:  # noqa: ASYNC110 - a process tells nobody
            await asyncio.sleep(0.02)


async def patiently(call, *arguments, **named):
    """Call again for as long as the connection is a dead one."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call(*arguments, **named)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.05)


async def begun(device, task, messages=1):
    """A stream of the header and so many chunks of an update, once they are held."""
    manifest, payload = encoded(update_of())
    stream = ClientStream(device.stub.PushUpdate(timeout=PATIENCE_S))
    await stream.write(pb.PushUpdateRequest(header=device.header(task, manifest)))
    for message in chunks(payload)[:messages]:
        await stream.write(message)
    await device.until_held(task, 2048 * messages)
    return stream


async def test_updates_that_ingest_processes_seal_are_averaged(tmp_path):
    async with running_aggregator(tmp_path, ingest=2, durable=True) as running:
        a, b = await running.device("a"), await running.device("b")
        tasks = await asyncio.gather(a.task(), b.task())
        await asyncio.gather(a.push(tasks[0], update_of(1.0)), b.push(tasks[1], update_of(3.0)))
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 2.0, rtol=1e-6)


async def test_models_come_whole_and_from_any_byte_and_status_and_metrics_tell_of_the_processes(tmp_path):
    async with running_aggregator(tmp_path, ingest=2, policy=ONE) as running:
        device = await running.device("a")
        task = await device.task()
        whole, rest = await device.pull(task), await device.pull(task, offset=3000)
        assert rest[1] == whole[1][3000:]
        np.testing.assert_array_equal((await device.model(task))["w"], MODEL["w"])
        ingest = (await running.run()).ingest
        assert (ingest.wanted, ingest.serving, ingest.restarts) == (2, 2, 0)
        sample = running.aggregator._metrics.registry.get_sample_value
        assert sample("fedgrpc_ingest_processes") == 2
        assert sample("fedgrpc_ingest_restarts") == 0
        assert min(ingest.memory_bytes, sample("fedgrpc_ingest_memory_bytes")) > 20e6
        assert sample("fedgrpc_ingest_cpu_seconds") > 0
        assert re.fullmatch(r"ingest: 2 of 2 processes, 0 restarts, [0-9.]+ MB of memory", ingest_line(ingest))


async def test_an_upload_cut_by_the_death_of_its_process_goes_on_at_the_byte_that_is_held(tmp_path):
    async with running_aggregator(tmp_path, ingest=1, policy=ONE) as running:
        device = await running.device("a")
        task = await device.task()
        stream = await begun(device, task, 2)
        await killed(running)
        with pytest.raises(grpc.aio.AioRpcError):
            await stream.finish()
        held = await patiently(device.held, task)
        assert held.committed_size_bytes == 4096
        assert (await device.push(task, offset=4096)).complete
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1.0, rtol=1e-6)


async def test_an_acknowledged_update_outlives_its_process(tmp_path):
    async with running_aggregator(tmp_path, ingest=1, policy={"quorum": 2}) as running:
        a, b = await running.device("a"), await running.device("b")
        first, second = await asyncio.gather(a.task(), b.task())
        assert (await a.push(first, update_of(1.0))).complete
        await killed(running)
        assert (await patiently(a.held, first)).complete
        await patiently(b.push, second, update_of(3.0))
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 2.0, rtol=1e-6)


async def test_a_sealed_update_whose_process_died_before_it_told_is_sent_again_and_counts_once(tmp_path):
    async with running_aggregator(tmp_path, ingest=1, policy=ONE) as running:
        device = await running.device("a")
        task = await device.task()
        # Held on to: a call that nobody holds is cancelled.
        _stream = await begun(device, task)
        await killed(running)
        # As the rename left it.
        uploads = running.settings.data_dir / "uploads"
        (uploads / f"{task.token}.part").replace(uploads / f"{task.token}.update")
        assert (await patiently(device.held, task)).committed_size_bytes == 0
        assert (await patiently(device.push, task)).complete
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1.0, rtol=1e-6)


async def test_what_an_ingest_process_refuses_is_refused_as_ever(tmp_path):
    async with running_aggregator(tmp_path, ingest=1, policy={"min_workers": 3}) as running:
        a, b, c = [await running.device(name) for name in "abc"]
        tasks = await asyncio.gather(a.task(), b.task(), c.task())
        manifest, payload = encoded(update_of())
        wrong = bytearray(payload)
        wrong[400:404] = np.float32(np.nan).tobytes()
        lying = a.header(tasks[0], manifest)
        lying.manifest.digest = digest_of(wrong)
        with pytest.raises(UpdateRefused, match="not finite"), domain_errors():
            await a.send(pb.PushUpdateRequest(header=lying), *chunks(bytes(wrong)))
        assert (await running.until_task("a", round_pb2.TASK_PHASE_REJECTED)).worker == "a"
        wrong = bytes(payload[:-1]) + bytes([payload[-1] ^ 1])
        header = pb.PushUpdateRequest(header=b.header(tasks[1], manifest))
        with pytest.raises(CorruptError, match="digest"), domain_errors():
            await b.send(header, *chunks(wrong))
        assert (await b.push(tasks[1])).complete
        bad = chunks(payload)
        bad[1].chunk.crc32 ^= 1
        with pytest.raises(CorruptError), domain_errors():
            await c.send(pb.PushUpdateRequest(header=c.header(tasks[2], manifest)), *bad)
        assert (await c.held(tasks[2])).committed_size_bytes == 2048
        assert (await c.push(tasks[2], offset=2048)).complete


async def test_an_upload_whose_task_is_closed_hears_of_it_and_leaves_no_file(tmp_path):
    async with running_aggregator(tmp_path, ingest=1, rounds=2, policy={"quorum": 1}) as running:
        a, b = await running.device("a"), await running.device("b")
        first, second = await asyncio.gather(a.task(), b.task())
        manifest, payload = encoded(update_of())
        upload = a.stub.PushUpdate(timeout=PATIENCE_S)
        await upload.write(pb.PushUpdateRequest(header=a.header(first, manifest)))
        await upload.write(chunks(payload)[0])
        await a.until_held(first, 2048)
        await b.push(second)
        running.pass_time(601.0)
        with pytest.raises(RoundClosed), domain_errors():
            await upload
        await running.until_ended(1)
        assert not [name for name in running.kept_updates() if first.token in name]


async def test_a_newer_stream_of_an_update_takes_over_from_one_at_another_process(tmp_path):
    async with running_aggregator(tmp_path, ingest=2, policy=ONE) as running:
        device = await running.device("a")
        task = await device.task()
        stalled = await begun(device, task)
        assert (await device.push(task, offset=2048)).complete
        with pytest.raises(grpc.aio.AioRpcError):
            await stalled.finish()


async def test_an_upload_has_no_side_streams_and_goes_on_without(tmp_path):
    async with running_aggregator(tmp_path, ingest=2, policy=ONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of())
        first, *others = chunks(payload)
        upload = ClientStream(device.stub.PushUpdate(timeout=PATIENCE_S))
        await upload.write(pb.PushUpdateRequest(header=device.header(task, manifest)))
        await upload.write(first)
        async with open_channel(running.address) as another:
            side = aggregator_pb2_grpc.AggregatorStub(another).PushUpdate(timeout=PATIENCE_S)
            stream = ClientStream(side)
            await stream.write(pb.PushUpdateRequest(beside={"worker": "a", "token": task.token}))
            assert SIDE_KEY not in await side.initial_metadata()
            with pytest.raises(Exhausted), domain_errors():
                await stream.finish()
        for message in others:
            await upload.write(message)
        assert (await upload.finish()).complete


async def test_a_revoked_device_is_refused_at_its_next_call_through_an_ingest_process(tmp_path):
    async with running_aggregator(tmp_path, ingest=2, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "pi-7")
        async with connected(running, tls) as channel:
            device = HandDrivenDevice(aggregator_pb2_grpc.AggregatorStub(channel), "pi-7")
            await device.register()
            with pytest.raises(WrongIdentity), domain_errors():
                await HandDrivenDevice(device.stub, "pi-8").register()
            await revoke(running, "pi-7", why="stolen")
            with pytest.raises(WrongIdentity, match="revoked: stolen"), domain_errors():
                await device.register()


def _ingest_pids(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


@pytest.mark.faults
async def test_a_run_whose_processes_are_killed_again_and_again_ends_as_any_other(tmp_path):
    """First its ingest processes, then the run's own, which takes them along."""
    rng, address = random.Random(3), free_address()
    arguments = ["--rounds", 6, "--ingest", 2, "--quorum", 2]
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        workers = [worker_process(running, tmp_path, name, tmp_path / f"data-{name}") for name in "ab"]
        async with workers[0], workers[1]:
            for number in (1, 2, 3):
                await patiently(running.until_ended, number)
                os.kill(rng.choice(_ingest_pids(process.pid)), signal.SIGKILL)
                await process.until("ingest process ended")
            children = _ingest_pids(process.pid)
            await process.kill()
            async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
                run = await patiently(running.until_finished)
                assert run.model_version == 7
                assert not set(children) & set(_ingest_pids(process.pid))
                process.send(signal.SIGTERM)
                assert await process.ended() == 128 + signal.SIGTERM

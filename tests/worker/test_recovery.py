"""Links, restarts and bounds: what is begun goes on where it stopped, what is refused for good is dropped."""

import asyncio
import threading
import time
import zlib

import numpy as np
import pytest
import structlog

from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import (
    CorruptError,
    Exhausted,
    LayoutError,
    LinkError,
    NameTaken,
    RoundClosed,
    StateCopied,
    StorageError,
    TooLargeError,
    UnknownTask,
    UnknownWorker,
    UpdateRefused,
    WrongIdentity,
)
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.trainer import TrainResult
from fedgrpc.v1.aggregator_pb2 import ModelHeader, PullModelResponse
from fedgrpc.worker.process import Worker, run_worker
from fedgrpc.worker.throttle import Throttle
from tests.support.fake_aggregator import PATIENCE_S, SOON_S, FakeAggregator, model, serving, train_task
from tests.support.processes import free_address
from tests.support.running_worker import AddOneTrainer, run_against, running_worker, spooled, worker_settings


def with_a_task(**about):
    return FakeAggregator({1: model(1)}, tasks=[train_task()], **about)


@pytest.mark.parametrize("chunk", [1, 5, 12])
async def test_a_broken_download_goes_on_at_the_byte_where_it_stopped(tmp_path, chunk):
    peer = with_a_task()

    async def note(call, note=peer.note):
        await note(call)
        if call == "PullModel.chunk" and peer.calls.count("PullModel.chunk") == chunk + 1:
            raise LinkError("cut")

    peer.note = note
    assert await run_against(peer, tmp_path) == 0
    assert [offset for _, offset, _ in peer.pulled] == [0, chunk * 1000]
    assert np.allclose(peer.uploads["t1"].tensors()["weight"], 1, atol=1e-6)


async def test_an_update_survives_an_aggregator_that_takes_smaller_chunks_after_a_restart(tmp_path):
    peer = with_a_task()

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate.chunk" and peer.calls.count(call) == 3:
            peer.max_chunk_bytes = 300

    peer.note = note
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete


async def test_an_update_outlives_a_time_in_which_another_device_has_the_name(tmp_path):
    peer = with_a_task()
    peer.faults += [("PushUpdate", NameTaken("another device")), ("Register", NameTaken("another device"))]
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete


async def test_a_worker_ends_when_its_state_was_copied_and_keeps_its_update(tmp_path):
    peer = with_a_task()
    peer.faults += [("PushUpdate", StateCopied("another process"))]
    with pytest.raises(StateCopied):
        await run_against(peer, tmp_path)
    assert len(spooled(tmp_path)) == 1


async def test_chunks_of_a_model_that_declares_no_bytes_do_not_end_the_worker(tmp_path):
    peer = with_a_task()

    async def pull(request, context):
        await peer.note("PullModel")
        manifest = manifest_to_proto(Manifest.of_nothing())
        yield PullModelResponse(header=ModelHeader(version=1, manifest=manifest))
        yield PullModelResponse(chunk={"data": b"x", "crc32": zlib.crc32(b"x")})

    peer.PullModel = pull
    async with (
        serving(peer) as server,
        running_worker(Worker(worker_settings(server.address, tmp_path), lambda _: AddOneTrainer())),
    ):
        await peer.until(lambda: peer.failures or peer.calls.count("PullModel") > 2)


async def test_a_corrupt_chunk_is_asked_for_again_and_nothing_before_it(tmp_path):
    peer = with_a_task()
    peer.faults = ["corrupt"]
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert len(peer.pulled) == 2


async def test_a_model_that_changed_under_a_partial_download_starts_over(tmp_path):
    peer = with_a_task()

    async def note(call, note=peer.note):
        await note(call)
        if call == "PullModel.chunk" and peer.calls.count(call) == 4:
            peer.models[1] = model(99)
            raise LinkError("restarted with another model")

    peer.note = note
    assert await run_against(peer, tmp_path) == 0
    assert [offset for _, offset, _ in peer.pulled] == [0, 3000, 0]


@pytest.mark.parametrize("moment", ["PushUpdate", "PushUpdate.chunk", "PushUpdate.acknowledge", "QueryPush"])
@pytest.mark.parametrize(
    "error",
    [LinkError("cut"), Exhausted("no upload slot is free"), StorageError("disk full"), RuntimeError("bug")],
)
async def test_an_upload_that_failed_for_now_is_resumed_until_it_is_acknowledged(tmp_path, moment, error):
    peer = with_a_task()
    peer.faults = [(moment, error)]
    trainer = AddOneTrainer()
    assert await run_against(peer, tmp_path, trainer) == 0
    assert peer.uploads["t1"].complete
    assert trainer.trained == 1
    assert spooled(tmp_path) == []


async def test_a_refused_upload_comes_back_when_it_is_told_and_keeps_its_session(tmp_path):
    peer = with_a_task()
    peer.faults = [("PushUpdate", Exhausted("no upload slot is free", retry_after_s=0.05)) for _ in range(5)]
    assert await run_against(peer, tmp_path) == 0
    _, *after = peer.calls[peer.calls.index("PushUpdate") :]
    assert after.count("PushUpdate") == 5
    assert "Register" not in after
    assert "QueryPush" not in after


async def test_a_refused_upload_that_is_told_to_come_at_once_leaves_a_moment(tmp_path):
    peer = with_a_task()
    peer.faults = [("PushUpdate", Exhausted("no upload slot is free", retry_after_s=0.0)) for _ in range(5)]
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert peer.pushed_at[5] - peer.pushed_at[0] >= 5 * 0.05


async def test_a_worker_that_has_something_to_send_asks_first_and_comes_when_it_is_told(tmp_path):
    peer = with_a_task()
    peer.faults = [("PushUpdate.chunk", LinkError("cut"))]
    peer.retry_after_s = 0.2
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert peer.pushed_at[1] - peer.told_at >= 0.2


async def test_one_who_waits_for_its_turn_hears_that_the_round_is_over(tmp_path):
    peer = with_a_task(ends=False)
    peer.faults = [("PushUpdate", Exhausted("no upload slot is free", retry_after_s=3000.0))]
    async with serving(peer) as server:
        worker = Worker(worker_settings(server.address, tmp_path), lambda _: AddOneTrainer())
        async with running_worker(worker):
            await peer.until(lambda: "PushUpdate" in peer.calls)
            peer.cancelled["t1"] = "the round is closed"
            peer.closed["t1"] = "the round is closed"
            await peer.until(lambda: not spooled(tmp_path))


async def test_an_upload_resumes_at_the_byte_the_aggregator_holds(tmp_path):
    peer = with_a_task()

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate.chunk" and peer.calls.count(call) == 7:
            raise LinkError("cut")

    peer.note = note
    assert await run_against(peer, tmp_path) == 0
    total_chunks = -(-len(peer.uploads["t1"].data) // 1000)
    assert peer.calls.count("PushUpdate.chunk") == total_chunks + 1


async def test_an_answer_that_is_no_acknowledgement_does_not_end_the_upload(tmp_path):
    peer = with_a_task()
    peer.faults = ["incomplete"]
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete
    assert peer.calls.count("PushUpdate") == 2


async def test_a_lost_acknowledgement_makes_no_second_update(tmp_path):
    peer = with_a_task()
    peer.faults = [("PushUpdate.acknowledged", LinkError("cut"))]
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].acknowledged_times == 1
    assert spooled(tmp_path) == []


@pytest.mark.parametrize("call", ["Register", "PollTask", "Heartbeat", "PullModel", "PushUpdate"])
async def test_a_worker_that_the_aggregator_has_forgotten_registers_again(tmp_path, call):
    peer = with_a_task()
    peer.faults = [(call, UnknownWorker("who are you?"))]
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t1"].complete


@pytest.mark.parametrize(
    "error",
    [
        RoundClosed("the deadline has passed"),
        UpdateRefused("its norm is 1e9"),
        LayoutError("weight has the wrong shape"),
        TooLargeError("over the limit"),
        WrongIdentity("another worker's"),
        UnknownTask("no such token"),
    ],
)
async def test_an_update_that_is_refused_for_good_is_dropped_and_the_next_task_is_taken(tmp_path, error):
    peer = FakeAggregator({1: model(1)}, tasks=[train_task("t1"), train_task("t2")])

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate.chunk" and peer.calls.count(call) == 2:
            await peer.finished("t1")
            raise error

    peer.note = note
    with structlog.testing.capture_logs() as logs:
        assert await run_against(peer, tmp_path) == 0
    assert spooled(tmp_path) == []
    assert not peer.uploads["t1"].complete
    assert peer.uploads["t2"].complete
    [line] = [line for line in logs if line["event"] == "update refused"]
    assert (line["run"], line["round"], line["worker"]) == ("test-run", 1, "pi-1")
    assert str(error) in line["reason"]


async def test_a_payload_that_rots_on_the_workers_disk_is_dropped_not_sent_for_ever(tmp_path):
    peer = FakeAggregator({1: model(1)}, tasks=[train_task("t1"), train_task("t2")])

    async def note(call, note=peer.note):
        await note(call)
        if call == "PushUpdate" and peer.calls.count(call) == 1:
            payload = tmp_path / "state" / "spool" / "00000001" / "payload"
            payload.write_bytes(bytes(payload.stat().st_size))
            raise CorruptError("the digest does not match")
        if call == "Heartbeat" and spooled(tmp_path) == [] and peer.calls.count("PushUpdate") == 1:
            await peer.finished("t1")

    peer.note = note
    assert await run_against(peer, tmp_path) == 0
    assert peer.uploads["t2"].complete


async def test_a_paced_link_takes_as_long_as_its_bytes_and_a_slowdown_as_long_as_it_says(tmp_path):
    class Works(AddOneTrainer):
        def train(self, weights, job):
            for _ in job.batches(4, 1):
                time.sleep(0.02)
            return TrainResult(weights, 4, 4)

    peer = with_a_task()
    await run_against(peer, tmp_path, Works(), throttle=Throttle(slowdown=3, link_bits_per_second=480_000))
    timings = peer.uploads["t1"].header.timings
    assert timings.download_seconds >= 12_048 * 8 / 480_000
    assert timings.local_seconds >= 3 * 4 * 0.02
    assert timings.local_seconds < SOON_S


async def test_an_aggregator_that_hangs_in_the_middle_of_a_stream_is_given_up(tmp_path):
    peer = with_a_task()

    async def note(call, note=peer.note):
        await note(call)
        if call in ("PullModel.chunk", "PushUpdate.acknowledge") and peer.calls.count(call) == 1:
            await asyncio.Event().wait()

    peer.note = note
    assert await run_against(peer, tmp_path, stall_s=1.0) == 0
    assert peer.uploads["t1"].complete


async def test_a_worker_starts_before_its_aggregator_and_finds_it(tmp_path):
    address = free_address()
    peer = with_a_task()
    task = asyncio.create_task(run_worker(worker_settings(address, tmp_path), AddOneTrainer()))
    await asyncio.sleep(0.3)
    async with serving(peer, address):
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert peer.uploads["t1"].complete


async def test_training_goes_on_while_the_aggregator_is_away_and_its_update_arrives_afterwards(tmp_path):
    peer = with_a_task()
    gate = threading.Event()
    trainer = AddOneTrainer(steps=30, gate=gate)
    address = free_address()
    async with serving(peer, address):
        task = asyncio.create_task(run_worker(worker_settings(address, tmp_path), trainer))
        await asyncio.to_thread(trainer.started.wait, PATIENCE_S)
    await asyncio.sleep(0.2)
    gate.set()
    async with serving(peer, address):
        assert await asyncio.wait_for(task, PATIENCE_S) == 0
    assert trainer.trained == 1
    assert peer.uploads["t1"].complete

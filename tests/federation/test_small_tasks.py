"""Small tasks take few calls: the model comes along with the task, the update goes in one message."""

import asyncio
import hashlib
import time
from collections import Counter
from contextlib import ExitStack

import grpc.aio
import numpy as np
from safetensors.numpy import save_file

from fedgrpc.aggregator.host_service import HostService
from fedgrpc.aggregator.models_along import ModelsAlong
from fedgrpc.aggregator.payload_encoder import EncodedModel
from fedgrpc.codec.chunk import FIRST_CHUNK_BYTES
from fedgrpc.codec.digest import digest_of
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rpc.framing import polled as polled_message
from fedgrpc.rpc.framing import push_whole
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import tensor_pb2
from fedgrpc.worker.throttle import Throttle
from tests.support.hand_driven_device import MODEL, PATIENCE_S, chunks, encoded, refused, update_of
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

ALONE = {"min_workers": 1}
LARGE = {"w": np.zeros((300, 100), np.float32)}


async def polled(device, most_bytes, held=(0, b"")):
    request = pb.PollTaskRequest(worker=device.name, wait=duration_to_proto(10.0), model_bytes=most_bytes)
    request.held_version, request.held_digest = held
    while not (reply := await device.stub.PollTask(request)).HasField("task"):
        assert not reply.run_ended
    return reply


def tensors_in(model):
    return tensors_of(PayloadReader(manifest_from_proto(model.header.manifest), buffer_reader(model.chunk.data)))


def in_one(device, task, tensors=None, **changes):
    manifest, payload = encoded(update_of() if tensors is None else tensors)
    (whole,) = chunks(payload, chunk_bytes=len(payload))
    return pb.PushUpdateRequest(header=device.header(task, manifest, **changes), whole=whole.chunk)


async def test_a_small_model_comes_along_with_its_task_as_a_pull_would_bring_it(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ALONE) as running:
        device = await running.device("a")
        reply = await polled(device, FIRST_CHUNK_BYTES)
        header, payload = await device.pull(reply.task)
        assert (reply.model.header, reply.model.chunk.data) == (header, payload)
        assert hashlib.sha256(payload).digest() == header.sha256
        np.testing.assert_array_equal(tensors_in(reply.model)["w"], MODEL["w"])


async def test_what_the_worker_holds_comes_as_a_difference_and_what_it_wants_not_does_not_come(tmp_path):
    recipes = {"download_recipe": "int8+zstd", "upload_recipe": "raw"}
    async with running_aggregator(tmp_path, rounds=2, policy=ALONE, **recipes) as running:
        device = await running.device("a")
        for most_bytes in (0, 100, 500):
            assert not (await polled(device, most_bytes)).HasField("model")
        first = await polled(device, FIRST_CHUNK_BYTES)
        held = (1, first.model.header.manifest.digest)
        again = await polled(device, FIRST_CHUNK_BYTES, held)
        assert (again.model.header.base_version, again.model.HasField("chunk")) == (1, False)
        await device.push(first.task)
        second = await polled(device, FIRST_CHUNK_BYTES, held)
        assert (second.model.header.version, second.model.header.base_version) == (2, 1)
        assert second.model.header.HasField("held_crc32")


async def asked(device, most_bytes):
    """The answer to a poll over the open call of a worker's polls."""
    call = device.stub.PollTasks()
    poll = pb.PollTaskRequest(worker=device.name, wait=duration_to_proto(10.0), model_bytes=most_bytes)
    await call.write(pb.PollTasksRequest(poll=poll))
    return (await call.read()).answer


async def test_a_model_comes_along_over_an_open_call_unless_it_is_larger_than_all_that_may(tmp_path, monkeypatch):
    for most_bytes in (len(MODEL["w"].tobytes()), len(MODEL["w"].tobytes()) - 1):
        monkeypatch.setattr("fedgrpc.aggregator.models_along._MOST_BYTES", most_bytes)
        folder = tmp_path / str(most_bytes)
        folder.mkdir()
        async with running_aggregator(folder, rounds=1, policy=ALONE) as running, asyncio.timeout(PATIENCE_S):
            device = await running.device("a")
            reply = await asked(device, FIRST_CHUNK_BYTES)
            header, payload = await device.pull(reply.task)
            assert reply.HasField("model") == (len(payload) <= most_bytes)
            if reply.HasField("model"):
                assert (reply.model.header, reply.model.chunk.data) == (header, payload)


async def test_a_model_waits_for_those_on_their_way_and_is_pulled_where_they_take_long(monkeypatch):
    monkeypatch.setattr("fedgrpc.aggregator.models_along._MOST_BYTES", 150_000)
    monkeypatch.setattr("fedgrpc.aggregator.models_along._WAIT_S", 0.05)
    along, (large, small) = ModelsAlong(), map(of_size, (100_000, 10_000))
    with ExitStack() as others:
        assert await along.message(None, 1 << 20, others) == b""
        assert await along.message(small, 9_999, others) == b""
        with ExitStack() as first:
            assert await along.message(large, 100_000, first)
            begun = time.monotonic()
            for _ in range(20):
                assert await along.message(large, 1 << 20, others) == b""
            assert time.monotonic() - begun < 10 * 0.05, "where nothing leaves, only the first one waits"
            assert await along.message(small, 1 << 20, others)
        with ExitStack() as first:
            assert await along.message(large, 100_000, first)
            waiting = asyncio.create_task(along.message(large, 1 << 20, others))
            await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting == large.header
        given_up = asyncio.create_task(along.message(large, 1 << 20, others))
        await asyncio.sleep(0)
        given_up.cancel()
    assert await along.message(large, 1 << 20, others)


def of_size(size_bytes):
    manifest, payload = encoded({"w": np.zeros(size_bytes // 4, np.float32)})
    assert len(payload) == size_bytes
    return EncodedModel(1, manifest_from_proto(manifest), None)


def test_an_answer_with_a_model_is_what_protobuf_would_write():
    model = pb.TaskModel(header=pb.ModelHeader(version=3), chunk=tensor_pb2.Chunk(data=b"x" * 1000))
    answer = pb.PollTaskResponse(task=pb.Task(token="t" * 200), run_ended=True)
    whole = pb.PollTaskResponse(task=answer.task, run_ended=True, model=model)
    for bytes_, expected in ((model.SerializeToString(), whole), (b"", answer)):
        assert pb.PollTasksResponse.FromString(polled_message(answer, bytes_)).answer == expected


async def test_an_update_in_one_message_counts_once_however_often_it_comes(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy={"min_workers": 2, "quorum": 2}) as running:
        device, other = await running.device("a"), await running.device("b")
        task, last = await asyncio.gather(device.task(), other.task())
        request = in_one(device, task, update_of(2.0))
        for _ in range(3):
            reply = await device.send(request)
            assert (reply.complete, reply.committed_size_bytes) == (True, request.header.manifest.size_bytes)
        assert running.kept_updates() == [f"{task.token}.update"]
        await other.send(in_one(other, last, update_of(4.0)))
        await running.until_ended(1)
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 3.0)


async def test_a_damaged_update_in_one_message_leaves_nothing_and_may_come_again(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        request = in_one(device, task)
        good = request.whole.data
        request.whole.data = good[:100] + bytes([good[100] ^ 1]) + good[101:]
        with refused("DATA_LOSS", "CRC", "CorruptError"):
            await device.send(request)
        assert (await device.held(task)).committed_size_bytes == 0
        request.whole.data = good[:-1]
        with refused("INVALID_ARGUMENT", "all of a small update", "LayoutError"):
            await device.send(request)
        assert (await device.send(in_one(device, task))).complete


async def test_what_is_refused_in_a_stream_is_refused_in_one_message(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of())
        poisoned = payload[:400] + np.float32(np.nan).tobytes() + payload[404:]
        manifest.digest = digest_of(poisoned)
        (whole,) = chunks(poisoned, chunk_bytes=len(poisoned))
        request = pb.PushUpdateRequest(header=device.header(task, manifest), whole=whole.chunk)
        with refused("INVALID_ARGUMENT", "finite", "UpdateRefused"):
            await device.send(request)
        assert not running.kept_updates()


async def test_a_stream_that_has_begun_is_continued_and_not_begun_again_by_one_message(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of())
        header = pb.PushUpdateRequest(header=device.header(task, manifest))
        await device.send(header, *chunks(payload)[:1])
        with refused("OUT_OF_RANGE", "expected 2048", "WrongOffset"):
            await device.send(in_one(device, task))
        assert (await device.send(header, *chunks(payload, 2048))).complete


async def test_a_large_update_does_not_come_with_its_header(tmp_path):
    save_file(LARGE, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, rounds=1, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        with refused("INVALID_ARGUMENT", "all of a small update", "LayoutError"):
            await device.send(in_one(device, task, {"w": np.ones((300, 100), np.float32)}))


async def test_a_unary_call_is_a_stream_of_one_message(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        async with grpc.aio.insecure_channel(running.address) as channel:
            assert (await push_whole(channel)(in_one(device, task))).complete


async def test_a_worker_takes_two_calls_for_a_small_task(tmp_path, monkeypatch):
    """One poll, with the model; one message, with the update."""
    calls = Counter()
    for method in ("PollTask", "PullModel", "PushUpdate", "QueryPush", "Heartbeat"):
        count_calls(monkeypatch, method, calls)
    async with running_aggregator(tmp_path, rounds=5, policy=ALONE, stay=False) as running:
        worker = start_worker(running, tmp_path, "a", ShiftTrainer())
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        np.testing.assert_allclose(running.weights(6)["b"], MODEL["b"] + 5.0)
    assert (calls["PullModel"], calls["QueryPush"], calls["PushUpdate"]) == (0, 0, 5)


async def test_an_update_of_one_message_tells_how_long_the_last_one_took(tmp_path):
    """The aggregator sees it all at once, and T_upload would be 0."""
    async with running_aggregator(tmp_path, rounds=3, policy=ALONE) as running:
        worker = start_worker(
            running, tmp_path, "a", ShiftTrainer(), throttle=Throttle(link_bits_per_second=4000.0)
        )
        await running.until_finished()
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        tasks = [(await running.round(number)).tasks[0] for number in (2, 3)]
    for task in tasks:
        assert task.timings.upload_seconds > 0.9 * task.upload_bytes * 8 / 4000


def count_calls(monkeypatch, method, calls):
    served = getattr(HostService, method)

    async def counted(self, request, context):
        calls[method] += 1
        return await served(self, request, context)

    monkeypatch.setattr(HostService, method, counted)

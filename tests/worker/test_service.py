import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgrpc.codec.chunk import check_chunk
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of
from fedgrpc.errors import NotFound, WrongOffset
from fedgrpc.protocol.tensors import chunk_from_proto, manifest_from_proto
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.server import WORKER
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import round_pb2, worker_pb2, worker_pb2_grpc
from fedgrpc.worker.process import Worker
from tests.support.fake_aggregator import PATIENCE_S, SOON_S, FakeAggregator, model, serving, train_task
from tests.support.running_worker import AddOneTrainer, worker_settings


@asynccontextmanager
async def served(peer, tmp_path, trainer=None):
    """A running worker and a stub of its service."""
    async with serving(peer) as aggregator:
        worker = Worker(
            worker_settings(aggregator.address, tmp_path, serve_address="127.0.0.1:0"),
            lambda _: trainer or AddOneTrainer(),
        )
        task = asyncio.create_task(worker.run())
        await peer.until(lambda: "PollTask" in peer.calls)
        async with open_channel(worker.server.address) as channel:
            yield worker_pb2_grpc.WorkerStub(channel), worker, task, channel
        worker.stop()
        await asyncio.wait_for(task, PATIENCE_S)


async def pull(stub, offset=0):
    header, data = None, bytearray()
    with domain_errors():
        async for message in stub.PullModel(worker_pb2.WorkerPullModelRequest(offset=offset)):
            if header is None:
                header = message.header
                continue
            chunk = chunk_from_proto(message.chunk)
            check_chunk(chunk, offset + len(data), 1 << 30)
            data += chunk.data
    return header, bytes(data)


async def test_the_status_tells_who_the_worker_is_and_what_it_did(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks = [train_task()]
    async with served(peer, tmp_path) as (stub, _, _, _):
        await peer.until(lambda: peer.calls.count("PollTask") >= 2)
        status = (await stub.GetStatus(worker_pb2.GetStatusRequest())).status
    assert (status.worker, status.run, status.round, status.model_version) == ("pi-1", "test-run", 1, 1)
    assert status.activity == worker_pb2.ACTIVITY_WAITING
    assert status.last_timings.download_seconds > 0
    assert status.last_timings.upload_seconds > 0
    assert (status.spooled_updates, status.last_error) == (0, "")


async def test_the_last_error_is_told_in_one_line(tmp_path):
    class Fails(AddOneTrainer):
        def train(self, weights, job):
            raise ValueError("no\nluck")

    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks = [train_task()]
    async with served(peer, tmp_path, Fails()) as (stub, _, _, _):
        await peer.until(lambda: "t1" in peer.failures)
        status = (await stub.GetStatus(worker_pb2.GetStatusRequest())).status
    assert status.last_error.startswith("the learning task raised ValueError: no luck (test_service.py:")


async def test_a_watcher_sees_the_worker_train_and_wait_again(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    gate = threading.Event()
    async with served(peer, tmp_path, AddOneTrainer(steps=5_000, gate=gate)) as (stub, _, _, _):
        watch = stub.WatchStatus(worker_pb2.WatchStatusRequest())
        await watch.read()
        await peer.give(train_task())
        seen = []
        while worker_pb2.ACTIVITY_TRAINING not in seen or seen[-1] != worker_pb2.ACTIVITY_WAITING:
            status = (await watch.read()).status
            seen.append(status.activity)
            if status.activity == worker_pb2.ACTIVITY_TRAINING:
                assert status.task_kind == round_pb2.TASK_KIND_TRAIN
                gate.set()
        watch.cancel()


async def test_before_the_first_task_there_is_no_model_to_pull(tmp_path):
    async with served(FakeAggregator(ends=False), tmp_path) as (stub, _, _, _):
        with pytest.raises(NotFound, match="no model yet"):
            await pull(stub)


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8+zstd"])
async def test_an_application_pulls_the_held_model_raw_and_resumes_anywhere(tmp_path, recipe):
    peer = FakeAggregator({1: model(1)}, ends=False)
    peer.tasks, peer.recipe = [train_task()], recipe
    async with served(peer, tmp_path) as (stub, _, _, _):
        await peer.until(lambda: "t1" in peer.uploads and peer.uploads["t1"].complete)
        header, data = await pull(stub)
        _, rest = await pull(stub, offset=len(data) - 77)
        _, nothing = await pull(stub, offset=len(data))
        with pytest.raises(WrongOffset):
            await pull(stub, offset=len(data) + 1)
    assert (rest, nothing) == (data[-77:], b"")
    manifest = manifest_from_proto(header.manifest)
    assert {str(entry.encoding) for entry in manifest.entries} == {"raw"}
    assert manifest.compression == "none"
    tensors = tensors_of(PayloadReader(manifest, buffer_reader(data)))
    tolerance = 0.05 if recipe.startswith("int8") else 0
    for name, array in model(1).items():
        assert np.allclose(tensors[name], array, atol=tolerance), name


async def test_the_owner_pauses_and_resumes_the_worker(tmp_path):
    peer = FakeAggregator({1: model(1)}, ends=False)
    async with served(peer, tmp_path) as (stub, worker, _, _):
        await stub.Pause(worker_pb2.PauseRequest())
        await peer.give(train_task())
        async for status in worker.publisher.watch(0):
            if status.activity.value == worker_pb2.ACTIVITY_PAUSED:
                break
        assert peer.uploads == {}
        await stub.Resume(worker_pb2.ResumeRequest())
        await peer.until(lambda: "t1" in peer.uploads and peer.uploads["t1"].complete)


async def test_the_owner_drains_the_worker_and_its_process_ends(tmp_path):
    peer = FakeAggregator(ends=False)
    async with served(peer, tmp_path) as (stub, _, task, _):
        await stub.Drain(worker_pb2.DrainRequest())
        assert await asyncio.wait_for(task, SOON_S) == 0


async def test_the_workers_health_is_serving(tmp_path):
    async with served(FakeAggregator(ends=False), tmp_path) as (_, _, _, channel):
        request = health_pb2.HealthCheckRequest(service=WORKER)
        reply = await health_pb2_grpc.HealthStub(channel).Check(request)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_service_can_be_off(tmp_path):
    peer = FakeAggregator()
    async with serving(peer) as aggregator:
        worker = Worker(worker_settings(aggregator.address, tmp_path), lambda _: AddOneTrainer())
        assert await worker.run() == 0
    assert worker.server is None


async def test_a_status_that_does_not_change_is_sent_once(tmp_path):
    async with served(FakeAggregator(ends=False), tmp_path) as (stub, _, _, _):
        watch = stub.WatchStatus(worker_pb2.WatchStatusRequest())
        await watch.read()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.read(), 0.6)

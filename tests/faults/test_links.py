"""Promises 2 and 3 over bad links: real workers reach a real aggregator through `Link`, a proxy that delays,
throttles, cuts and freezes.
"""

import asyncio

import grpc
import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.rpc.channel import CLIENT_OPTIONS
from fedgrpc.rpc.server import aggregator_service, serve
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2
from fedgrpc.worker.model_folder import received_bytes
from tests.faults.soak import SPARE_FILES, SPARE_TASKS, flap
from tests.faults.steadfast import Steadfast
from tests.faults.tasks import MODEL
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.unreliable_link import UnreliableLink

pytestmark = pytest.mark.faults

UPLOADING = round_pb2.TASK_PHASE_UPLOADING
PAYLOAD_BYTES = sum(a.nbytes for a in MODEL.values())


def large(folder):
    """Settings of one worker and a model of more than one chunk, small chunks for updates."""
    save_file(MODEL, folder / "large.safetensors")
    policy = {"min_workers": 1, "deadline_s": 300.0, "lease_s": 60.0}
    how = {
        "upload_recipe": "raw",
        "download_recipe": "raw",
        "max_chunk_bytes": 64 << 10,
        "heartbeat_interval_s": 0.2,
    }
    return {"policy": policy, "initial_model": folder / "large.safetensors", **how}


async def has_uploaded(running, least=0.2):
    """Until that part of the one worker's update has come."""

    def uploaded(run, round_):
        assert run.phase == pb.RUN_PHASE_RUNNING, "the upload went by unseen"
        return any(task.phase == UPLOADING and task.progress >= least for task in round_.tasks)

    await running.until(uploaded)


async def a_chunk_is_kept(state_dir):
    """Until the first of the two chunks of a download is on the worker's disk."""
    folder = state_dir / "model" / "partial"
    async with asyncio.timeout(PATIENCE_S):
        while not folder.exists() or not received_bytes(folder):  # noqa: ASYNC110 - nobody tells of a file
            await asyncio.sleep(0.01)


async def ends_well(running, worker, rounds=1):
    await running.until_finished()
    assert await asyncio.wait_for(worker, PATIENCE_S) == 0
    np.testing.assert_allclose(running.weights(rounds + 1)["w"], MODEL["w"] + rounds, rtol=1e-5)
    for number in range(1, rounds + 1):
        (task,) = (await running.round(number)).tasks
        assert task.phase == round_pb2.TASK_PHASE_ACCEPTED


@pytest.mark.parametrize("how", ["cut", "freeze"])
async def test_an_upload_goes_on_at_its_byte_after_the_link_was_away(tmp_path, how):
    trainer = ShiftTrainer(weights=MODEL)
    async with running_aggregator(tmp_path, **large(tmp_path)) as running, UnreliableLink(running.address) as link:
        worker = start_worker(link.address, tmp_path, "pi", Slowing(trainer, link), stall_s=1.5)
        await has_uploaded(running)
        sent = link.up_bytes
        getattr(link, how)()
        await asyncio.sleep(0.5 if how == "cut" else 2.5)
        link.bytes_per_s = None
        link.mend()
        link.thaw()
        await ends_well(running, worker)
        assert sent > 0.1 * PAYLOAD_BYTES
        if how == "cut":
            # Only what was on its way when the link went is sent again. A frozen link delivers that, too.
            assert link.up_bytes < 1.6 * PAYLOAD_BYTES
    assert len(trainer.jobs) == 1


class Slowing:
    """Trains as another does, and then the link becomes slow: about three seconds for the upload."""

    def __init__(self, trainer, link):
        self._trainer, self._link = trainer, link
        self.initial_weights, self.evaluate = trainer.initial_weights, trainer.evaluate

    def train(self, weights, job):
        result = self._trainer.train(weights, job)
        self._link.bytes_per_s = PAYLOAD_BYTES / 3
        return result


async def test_a_download_goes_on_at_its_byte_after_a_cut(tmp_path):
    async with (
        running_aggregator(tmp_path, **large(tmp_path)) as running,
        UnreliableLink(running.address, bytes_per_s=PAYLOAD_BYTES / 2) as link,
    ):
        worker = start_worker(link.address, tmp_path, "pi", ShiftTrainer(weights=MODEL))
        await a_chunk_is_kept(tmp_path / "pi")
        link.cut()
        link.bytes_per_s = None
        link.mend()
        await ends_well(running, worker)
        assert link.down_bytes < 1.6 * PAYLOAD_BYTES


async def test_a_far_and_narrow_link_only_takes_longer(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, **large(tmp_path)) as running:
        async with UnreliableLink(running.address, delay_s=0.1, bytes_per_s=1.5 * PAYLOAD_BYTES) as link:
            await ends_well(
                running, start_worker(link.address, tmp_path, "pi", ShiftTrainer(weights=MODEL)), rounds=2
            )
        (task,) = (await running.round(2)).tasks
        assert task.timings.upload_seconds > 0.5
        assert task.timings.download_seconds > 0.5


async def twice(call):
    """Made twice at once, as a proxy that repeats requests does. One answer will do; both may not fail."""
    answers = await asyncio.gather(call(), call(), return_exceptions=True)
    for answer in answers:
        if not isinstance(answer, BaseException):
            return answer
    raise answers[0]


class Repeated(HandDrivenDevice):
    async def register(self, *about):
        return await twice(lambda: HandDrivenDevice.register(self, *about))

    async def poll(self, *about):
        return await twice(lambda: HandDrivenDevice.poll(self, *about))

    async def held(self, task):
        return await twice(lambda: HandDrivenDevice.held(self, task))

    async def send(self, *messages):
        return await twice(lambda: HandDrivenDevice.send(self, *messages))


class Stutterer(Steadfast):
    device = Repeated


async def test_every_call_made_twice_counts_once(tmp_path):
    changes = large(tmp_path)
    policy = {**changes.pop("policy"), "min_workers": 2, "quorum": 2}
    changes["max_chunk_bytes"] = 1 << 20
    async with running_aggregator(tmp_path, rounds=3, policy=policy, **changes) as running:
        devices = [Stutterer(running.address, name) for name in "ab"]
        await asyncio.wait_for(asyncio.gather(*(device.live() for device in devices)), PATIENCE_S)
        for number in (1, 2, 3):
            round_ = await running.round(number)
            assert {task.phase for task in round_.tasks} == {round_pb2.TASK_PHASE_ACCEPTED}
            assert len(round_.tasks) == 2
            assert [len(device.tokens[number]) for device in devices] == [1, 1]
        workers = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert {(it.rounds_selected, it.rounds_accepted) for it in workers} == {(3, 3)}


async def test_a_link_that_flaps_costs_a_run_nothing(tmp_path):
    """The short form of `make soak`."""
    found = await flap(tmp_path, flaps=30, workers=2)
    assert found.flaps >= 30
    assert found.lost == []
    assert found.tasks_after <= found.tasks_before + SPARE_TASKS
    assert found.files_after <= found.files_before + SPARE_FILES


class Waiting(aggregator_pb2_grpc.AggregatorServicer):
    async def PollTask(self, request, context):  # noqa: N802
        await asyncio.sleep(request.wait.ToTimedelta().total_seconds())
        return pb.PollTaskResponse()


STRICT = [("grpc.http2.max_ping_strikes", 2), ("grpc.http2.min_ping_interval_without_data_ms", 300_000)]


@pytest.mark.parametrize("options", [[], STRICT], ids=["as we serve", "as gRPC serves"])
async def test_frequent_pings_are_not_too_many_for_an_aggregator(options):
    """gRPC's own limits end the connection of a client that pings as this one does, once a second; ours do not."""
    async with (
        serve("127.0.0.1:0", [aggregator_service(Waiting())], options=options) as server,
        grpc.aio.insecure_channel(
            server.address, options=[("grpc.keepalive_time_ms", 200), *CLIENT_OPTIONS]
        ) as channel,
    ):
        stub = aggregator_pb2_grpc.AggregatorStub(channel)
        call = stub.PollTask(pb.PollTaskRequest(wait=duration_to_proto(8.0)))
        if options:
            with pytest.raises(grpc.aio.AioRpcError, match="Too many pings"):
                await call
        else:
            await call

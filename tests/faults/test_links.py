"""Promises 2 and 3 over bad links: real workers reach a real aggregator through `Link`, a proxy that delays,
throttles, cuts and freezes.
"""

import asyncio

import grpc
import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.rpc.channel import CLIENT_OPTIONS
from fedgrpc.rpc.convert import duration_to_proto
from fedgrpc.rpc.server import aggregator_service, serve
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2
from tests.faults.link import Link
from tests.faults.soak import flap
from tests.faults.steadfast import Steadfast
from tests.faults.tasks import MODEL
from tests.federation.federation import PATIENCE_S, Shifter, aggregating, working

UPLOADING, DOWNLOADING = round_pb2.TASK_PHASE_UPLOADING, round_pb2.TASK_PHASE_DOWNLOADING
PAYLOAD_BYTES = sum(a.nbytes for a in MODEL.values())


def large(folder):
    """Settings of one worker and a model of more than one chunk, small chunks for updates."""
    save_file(MODEL, folder / "large.safetensors")
    policy = {"min_workers": 1, "deadline_s": 300.0, "lease_s": 60.0}
    return {"policy": policy, "initial_model": folder / "large.safetensors", "max_chunk_bytes": 64 << 10}


async def has_moved(running, phase, least=0.2):
    """Until the one worker is in that phase and has done some of it."""

    def moved(_, round_):
        return any(task.phase == phase and task.progress >= least for task in round_.tasks)

    await running.until(moved)


async def ends_well(running, worker, rounds=1):
    await running.until_finished()
    assert await asyncio.wait_for(worker, PATIENCE_S) == 0
    np.testing.assert_allclose(running.weights(rounds + 1)["w"], MODEL["w"] + rounds, rtol=1e-5)
    for number in range(1, rounds + 1):
        (task,) = (await running.round(number)).tasks
        assert task.phase == round_pb2.TASK_PHASE_ACCEPTED


@pytest.mark.parametrize("how", ["cut", "freeze"])
async def test_an_upload_goes_on_at_its_byte_after_the_link_was_away(tmp_path, how):
    trainer = Shifter(weights=MODEL)
    async with aggregating(tmp_path, **large(tmp_path)) as running, Link(running.address) as link:
        link.bytes_per_s = None
        worker = working(link.address, tmp_path, "pi", Slowing(trainer, link), stall_s=1.5)
        await has_moved(running, UPLOADING)
        sent = link.up_bytes
        getattr(link, how)()
        await asyncio.sleep(0.5 if how == "cut" else 2.5)
        link.bytes_per_s = None
        link.mend()
        link.thaw()
        await ends_well(running, worker)
        # What was on its way when the link went is sent again, and nothing else.
        assert sent > 0.1 * PAYLOAD_BYTES
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
    async with aggregating(tmp_path, **large(tmp_path)) as running:
        async with Link(running.address, bytes_per_s=PAYLOAD_BYTES / 3) as link:
            worker = working(link.address, tmp_path, "pi", Shifter(weights=MODEL))
            # A download is written down chunk by chunk, and its first chunk is most of it.
            await has_moved(running, DOWNLOADING, 0.1)
            link.cut()
            link.bytes_per_s = None
            link.mend()
            await ends_well(running, worker)
            assert link.down_bytes < 1.6 * PAYLOAD_BYTES


async def test_a_far_and_narrow_link_only_takes_longer(tmp_path):
    async with aggregating(tmp_path, rounds=2, **large(tmp_path)) as running:
        async with Link(running.address, delay_s=0.15, bytes_per_s=PAYLOAD_BYTES) as link:
            await ends_well(running, working(link.address, tmp_path, "pi", Shifter(weights=MODEL)), rounds=2)
        (task,) = (await running.round(2)).tasks
        assert task.timings.upload_seconds > 0.5
        assert task.timings.download_seconds > 0.5


class Stutterer(Steadfast):
    """Makes every call twice at once, as a proxy that repeats requests does."""

    async def _perform(self, device, task):
        await asyncio.gather(super()._perform(device, task), super()._perform(device, task))


async def test_every_call_made_twice_counts_once(tmp_path):
    changes = large(tmp_path)
    policy = {**changes.pop("policy"), "min_workers": 2, "quorum": 2}
    changes["max_chunk_bytes"] = 1 << 20
    async with aggregating(tmp_path, rounds=3, policy=policy, stay=False, drain_s=10.0, **changes) as running:
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
    assert found.tasks_after <= found.tasks_before
    assert found.files_after <= found.files_before + 8


class Waiting(aggregator_pb2_grpc.AggregatorServicer):
    async def PollTask(self, request, context):  # noqa: N802
        await asyncio.sleep(request.wait.ToTimedelta().total_seconds())
        return pb.PollTaskResponse()


STRICT = [("grpc.http2.max_ping_strikes", 2), ("grpc.http2.min_ping_interval_without_data_ms", 300_000)]


@pytest.mark.parametrize("options", [[], STRICT], ids=["as we serve", "as gRPC serves"])
async def test_frequent_pings_are_not_too_many_for_an_aggregator(options):
    """gRPC's own limits end the connection of a client that pings like this one; ours do not."""
    eager = [("grpc.keepalive_time_ms", 100), ("grpc.http2.min_time_between_pings_ms", 100)]
    async with serve("127.0.0.1:0", [aggregator_service(Waiting())], options=options) as server:
        async with grpc.aio.insecure_channel(server.address, options=[*CLIENT_OPTIONS, *eager]) as channel:
            call = aggregator_pb2_grpc.AggregatorStub(channel).PollTask(
                pb.PollTaskRequest(wait=duration_to_proto(2.0))
            )
            if options:
                with pytest.raises(grpc.aio.AioRpcError, match="too_many_pings"):
                    await call
            else:
                await call

"""Versions, tags and releases over real calls: devices serve to applications what a release gives them."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import numpy as np
import pytest

from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of
from fedgrpc.errors import IllegalTransition, NotFound, UsageError, WrongIdentity, WrongOffset
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rpc import framing
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.retry import Backoff
from fedgrpc.rpc.status import domain_errors
from fedgrpc.trainer import EvalResult
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.v1 import models_pb2_grpc, worker_pb2, worker_pb2_grpc
from fedgrpc.worker import releases
from fedgrpc.worker.process import Worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.hand_driven_device import MODEL, PATIENCE_S
from tests.support.running_federation import ShiftTrainer, running_aggregator


class Scoring(ShiftTrainer):
    """Scores a version with what `accuracy_of` says of its mean."""

    def __init__(self, accuracy_of):
        super().__init__()
        self.accuracy_of = accuracy_of

    def evaluate(self, weights):
        return EvalResult(10, {"accuracy": self.accuracy_of(float(weights["w"].mean()))})


@asynccontextmanager
async def device(folder, aggregator, name, accuracy_of=lambda mean: 0.95):
    """A real worker with its service, and that service's stub."""
    settings = WorkerSettings(
        name=name,
        aggregator=aggregator.address,
        state_dir=folder / name,
        serve_address="127.0.0.1:0",
        exit_when_run_ends=False,
        backoff=Backoff(0.05, 0.5),
        poll_wait_s=5.0,
    )
    worker = Worker(settings, lambda _: Scoring(accuracy_of))
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(PATIENCE_S):
        while worker.server is None:  # noqa: ASYNC110 - the process tells nobody
            await asyncio.sleep(0.01)
    async with open_channel(worker.server.address) as channel:
        yield worker_pb2_grpc.WorkerStub(channel)
    worker.stop()
    await asyncio.wait_for(running, PATIENCE_S)


@asynccontextmanager
async def model_calls(aggregator):
    async with open_channel(aggregator.address) as channel:
        yield models_pb2_grpc.ModelsStub(channel)


async def served(stub, wanted):
    """Wait until applications are told of a model that is `wanted`; returns it."""
    async with asyncio.timeout(PATIENCE_S):
        async for news in stub.WatchModel(worker_pb2.WatchModelRequest()):
            if wanted(news):
                return news
    raise AssertionError("the watch ended")


async def mean_served(stub, news):
    """The mean weight of the model that was told of, as an application pulls it."""
    request, payload = worker_pb2.WorkerPullModelRequest(digest=news.header.manifest.digest), bytearray()
    async for message in stub.PullModel(request):
        payload += message.chunk.data
    manifest = manifest_from_proto(news.header.manifest)
    return float(tensors_of(PayloadReader(manifest, buffer_reader(payload)))["w"].mean())


async def until_phase(models, phase, number=0):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = (await models.ListReleases(pb.ListReleasesRequest())).releases
            if found and found[0].phase == phase and number in (0, found[0].number):
                return (await models.ListReleases(pb.ListReleasesRequest(number=found[0].number))).releases[0]
            await asyncio.sleep(0.05)


@contextmanager
def refused(error):
    """The block ends with this domain error of the other side."""
    with pytest.raises(error), domain_errors():
        yield


def start(version, canary="1", after_s=0.6, conditions=("accuracy>=0.9",), **changes):
    return pb.StartReleaseRequest(
        version=version, canary=canary, conditions=conditions, after=duration_to_proto(after_s), **changes
    )


@asynccontextmanager
async def finished_run(folder, names=("pi-1", "pi-2"), accuracy_of=lambda mean: 0.95, **changes):
    """A run that has ended, its devices, and calls about its models."""
    settings = {"rounds": 2, "policy": {"min_workers": len(names)}, **changes}
    async with AsyncExitStack() as stack:
        aggregator = await stack.enter_async_context(running_aggregator(folder, **settings))
        models = await stack.enter_async_context(model_calls(aggregator))
        stubs = [await stack.enter_async_context(device(folder, aggregator, name, accuracy_of)) for name in names]
        await aggregator.until_finished()
        yield aggregator, models, stubs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(releases, "_AGAIN", Backoff(0.05, 0.3))


async def test_a_good_release_goes_from_the_canary_to_every_device_and_its_applications(tmp_path):
    async with finished_run(tmp_path) as (aggregator, models, stubs):
        before = await served(stubs[0], lambda news: news.header.version)
        assert before.release == 0
        await models.TagVersion(pb.TagVersionRequest(version="2", tag="v1.0"))
        started = (await models.StartRelease(start("v1.0"))).release
        assert (started.version, started.phase, len(started.canaries)) == (2, pb.RELEASE_PHASE_CANARY, 1)
        with refused(IllegalTransition):
            await models.StartRelease(start("3"))
        done = await until_phase(models, pb.RELEASE_PHASE_DONE)
        assert done.report_count == 2
        # The canary comes first.
        assert done.reports[0].worker == started.canaries[0]
        assert {report.worker for report in done.reports} == {"pi-1", "pi-2"}
        assert dict(done.reports[0].scores) == {"accuracy": pytest.approx(0.95)}
        for stub in stubs:
            news = await served(stub, lambda news: news.release == 1)
            assert news.header.version == 2
            assert await mean_served(stub, news) == pytest.approx(float(aggregator.weights(2)["w"].mean()))
            status = (await stub.GetStatus(worker_pb2.GetStatusRequest())).status
            assert (status.served_version, status.release, status.model_version > 0) == (2, 1, True)


async def test_a_bad_canary_takes_the_release_back_by_itself_and_the_audit_log_has_it(tmp_path):
    first = float(np.mean(MODEL["w"]))

    def accuracy_of(mean):
        return 0.95 if mean < first + 1.5 else 0.1

    async with finished_run(tmp_path, accuracy_of=accuracy_of) as (aggregator, models, stubs):
        await models.StartRelease(start("2", canary="100%"))
        await until_phase(models, pb.RELEASE_PHASE_DONE)
        await models.StartRelease(start("3", canary="pi-1", after_s=60))
        ended = await until_phase(models, pb.RELEASE_PHASE_ROLLED_BACK, number=2)
        assert "median accuracy of 1 device is 0.1" in ended.reason
        for stub in stubs:
            news = await served(stub, lambda news: news.release == 1)
            assert news.header.version == 2
        recorded = aggregator.aggregator.trust.audit.read(0)
        assert b"Models/RolledBack" in recorded
        assert b"Models/StartRelease" in recorded


async def test_an_operator_aborts_a_release_and_devices_serve_what_they_train_on(tmp_path):
    async with finished_run(tmp_path, names=("pi-1",), policy={"min_workers": 1}) as (_, models, stubs):
        held = await served(stubs[0], lambda news: news.header.version)
        await models.StartRelease(start("latest", after_s=60))
        await served(stubs[0], lambda news: news.release == 1)
        aborted = (await models.AbortRelease(pb.AbortReleaseRequest(reason="wrong one"))).release
        assert (aborted.phase, aborted.reason) == (pb.RELEASE_PHASE_ABORTED, "wrong one")
        news = await served(stubs[0], lambda news: not news.release)
        assert news.header.version == held.header.version
        with refused(NotFound):
            await models.AbortRelease(pb.AbortReleaseRequest())
        with refused(IllegalTransition):
            await models.AbortRelease(pb.AbortReleaseRequest(number=1))


async def test_a_release_and_a_tag_survive_the_aggregator_and_keep_their_versions(tmp_path):
    async with finished_run(tmp_path, names=("pi-1",), policy={"min_workers": 1}, rounds=1) as (_, models, stubs):
        await models.TagVersion(pb.TagVersionRequest(version="1", tag="first"))
        await models.StartRelease(start("2", after_s=300, conditions=()))
        await served(stubs[0], lambda news: news.release == 1)
    async with (
        running_aggregator(tmp_path, policy={"min_workers": 1}, rounds=6, keep_versions=1) as aggregator,
        model_calls(aggregator) as models,
        device(tmp_path, aggregator, "pi-1") as stub,
    ):
        # Before the aggregator has said anything, from the disk.
        assert (await served(stub, lambda news: news.header.version)).release == 1
        await aggregator.until_finished()
        listed = (await models.ListVersions(pb.ListVersionsRequest())).versions
        assert [each.version.version for each in listed[:2]] == [1, 2]
        assert listed[-1].version.version == 7
        assert (listed[0].tags, listed[1].release) == (["first"], 1)
        assert (await models.ListReleases(pb.ListReleasesRequest())).releases[0].phase == pb.RELEASE_PHASE_CANARY


async def test_a_version_is_pulled_whole_and_from_any_byte(tmp_path):
    async with finished_run(tmp_path, names=("pi-1",), policy={"min_workers": 1}) as (aggregator, models, _):
        got = (await models.GetVersion(pb.GetVersionRequest(version="best"))).version
        async with open_channel(aggregator.address) as channel:

            async def pull(version, offset=0, worker=""):
                payload = b""
                request = pb.PullVersionRequest(version=version, offset=offset, worker=worker)
                with domain_errors():
                    async for message in framing.pull_version(channel)(request):
                        if not isinstance(message, pb.PullVersionResponse):
                            payload += bytes(message.data)
                return payload

            number = got.version.version
            whole = await pull(number)
            assert len(whole) == got.size_bytes
            assert await pull(number, len(whole) - 7) == whole[-7:]
            with pytest.raises(WrongOffset):
                await pull(number, len(whole) + 1)
            with pytest.raises(NotFound):
                await pull(99)
            await aggregator.device("pi-9")
            with pytest.raises(WrongIdentity, match="no release gives"):
                await pull(number, worker="pi-9")


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (start("9"), NotFound),
        (start("1", canary="stranger"), UsageError),
        (start("1", conditions=["accuracy"]), UsageError),
        (start("1", after_s=0), UsageError),
        (start("1", run="other"), NotFound),
    ],
)
async def test_a_release_that_makes_no_sense_is_refused(tmp_path, request_, error):
    async with finished_run(tmp_path, names=("pi-1",), policy={"min_workers": 1}, rounds=1) as (_, models, _):
        with refused(error):
            await models.StartRelease(request_)
        assert not (await models.ListReleases(pb.ListReleasesRequest())).releases

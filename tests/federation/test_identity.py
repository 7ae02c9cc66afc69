"""Certificates of the operator's own authority, between processes: a caller is who its certificate says."""

from contextlib import contextmanager

import pytest

from fedgrpc.errors import NotEnrolled, WrongIdentity
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc
from tests.support.certificates import make_authority, make_certificate, tls_flags
from tests.support.processes import running_process
from tests.support.running_federation import settings_for

ROLES = {"server": None, "pi-1": "trainer", "pi-2": "trainer", "chief": "operator", "guest": "viewer"}


@pytest.fixture
def pki(tmp_path):
    folder = tmp_path / "pki"
    make_authority(folder)
    for name, role in ROLES.items():
        make_certificate(folder, name, role)
    return folder


def aggregator_process(tmp_path, pki, *arguments):
    place = ["--data-dir", tmp_path / "aggregator", "--address", "127.0.0.1:0", "--min-workers", 1]
    place += ["--initial-model", settings_for(tmp_path).initial_model, "--encoding", "raw", "--no-evaluate"]
    return running_process("aggregator", *place, "--lease", "60s", *tls_flags(pki, "server"), *arguments)


def worker_process(tmp_path, pki, port, name, certificate):
    data = tmp_path / f"data-{name}-{certificate}"
    data.mkdir()
    place = ["--aggregator", f"127.0.0.1:{port}", "--serve-address", "none", "--data", data]
    place += ["--name", name, "--state-dir", data / "state", "--task", "tests.support.learning_tasks:Recorded"]
    return running_process("worker", *place, *tls_flags(pki, certificate))


def stub_of(channel):
    return aggregator_pb2_grpc.AggregatorStub(channel)


def channel_of(port, pki, name):
    return open_channel(f"127.0.0.1:{port}", Tls(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}.key"))


async def test_a_worker_takes_part_under_the_name_of_its_certificate_and_under_no_other(tmp_path, pki):
    async with aggregator_process(tmp_path, pki, "--rounds", 2) as aggregator:
        port = (await aggregator.until("serving"))["port"]
        async with worker_process(tmp_path, pki, port, "pi-1", certificate="pi-2") as pretender:
            assert await pretender.ended() == 1
            assert "does not speak for worker 'pi-1'" in pretender.events[-1]["event"]
        async with worker_process(tmp_path, pki, port, "pi-1", certificate="pi-1") as worker:
            await aggregator.until("round committed", round=2)
            assert await worker.ended() == 0


async def test_no_call_is_open_to_another_name(tmp_path, pki):
    calls = {
        "Register": pb.RegisterRequest(worker="pi-1", encodings=["raw"]),
        "PollTask": pb.PollTaskRequest(worker="pi-1"),
        "Heartbeat": pb.HeartbeatRequest(worker="pi-1", token="t"),
        "QueryPush": pb.QueryPushRequest(worker="pi-1", token="t"),
        "ExchangeParts": pb.ExchangePartsRequest(worker="pi-1", token="t"),
        "ReportFailure": pb.ReportFailureRequest(worker="pi-1", token="t"),
        "Leave": pb.LeaveRequest(worker="pi-1"),
    }
    async with aggregator_process(tmp_path, pki) as aggregator:
        port = (await aggregator.until("serving"))["port"]
        async with channel_of(port, pki, "pi-2") as channel:
            stub = stub_of(channel)
            for name, request in calls.items():
                with refused():
                    await getattr(stub, name)(request)
            header = pb.PushUpdateRequest(header=pb.UpdateHeader(worker="pi-1", token="t"))
            with refused():
                await stub.PushUpdate(iter([header]))


@contextmanager
def refused():
    with pytest.raises(WrongIdentity, match="the trainer 'pi-2' does not speak for"), domain_errors():
        yield


async def test_an_operator_steers_a_viewer_looks_and_a_device_does_neither(tmp_path, pki):
    async with aggregator_process(tmp_path, pki) as aggregator:
        port = (await aggregator.until("serving"))["port"]
        async with channel_of(port, pki, "chief") as channel:
            assert (await stub_of(channel).PauseRun(pb.PauseRunRequest())).run.phase == pb.RUN_PHASE_PAUSED
        async with channel_of(port, pki, "guest") as channel:
            assert (await stub_of(channel).GetRun(pb.GetRunRequest())).run.phase == pb.RUN_PHASE_PAUSED
            with pytest.raises(WrongIdentity, match="may not call"), domain_errors():
                await stub_of(channel).ResumeRun(pb.ResumeRunRequest())
        async with channel_of(port, pki, "pi-2") as channel:
            for name, request in {"GetRun": pb.GetRunRequest(), "StopRun": pb.StopRunRequest()}.items():
                with pytest.raises(WrongIdentity, match="may not call"), domain_errors():
                    await getattr(stub_of(channel), name)(request)
        async with channel_of(port, pki, "server") as channel:
            with pytest.raises(NotEnrolled, match="needs one URI"), domain_errors():
                await stub_of(channel).GetRun(pb.GetRunRequest())

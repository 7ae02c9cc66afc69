"""Names tied to certificates, between processes: a worker is who its certificate says, and operators steer."""

from contextlib import contextmanager

import pytest

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError, WrongIdentity
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc
from tests.support.certificates import make_authority, make_certificate, tls_flags
from tests.support.processes import running_process
from tests.support.running_federation import settings_for

RULES = ("--certificate-names", "--operator", "chief")


@pytest.fixture
def pki(tmp_path):
    folder = tmp_path / "pki"
    make_authority(folder)
    for name in ("server", "pi-1", "pi-2", "chief"):
        make_certificate(folder, name)
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
    async with aggregator_process(tmp_path, pki, *RULES, "--rounds", 2) as aggregator:
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
        "ReportFailure": pb.ReportFailureRequest(worker="pi-1", token="t"),
        "Leave": pb.LeaveRequest(worker="pi-1"),
        "PauseRun": pb.PauseRunRequest(),
        "ResumeRun": pb.ResumeRunRequest(),
        "StopRun": pb.StopRunRequest(),
    }
    async with aggregator_process(tmp_path, pki, *RULES) as aggregator:
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
    with pytest.raises(WrongIdentity, match=r"a certificate for .*pi-2 "), domain_errors():
        yield


async def test_an_operator_steers_the_run_and_everybody_may_look(tmp_path, pki):
    async with aggregator_process(tmp_path, pki, *RULES) as aggregator:
        port = (await aggregator.until("serving"))["port"]
        async with channel_of(port, pki, "chief") as channel:
            assert (await stub_of(channel).PauseRun(pb.PauseRunRequest())).run.phase == pb.RUN_PHASE_PAUSED
        async with channel_of(port, pki, "pi-2") as channel:
            assert (await stub_of(channel).GetRun(pb.GetRunRequest())).run.phase == pb.RUN_PHASE_PAUSED


@pytest.mark.parametrize("rule", [{"certificate_names": True}, {"operators": ("chief",)}])
def test_rules_of_names_without_certificates_are_refused(tmp_path, rule):
    for tls in (None, Tls(certificate=tmp_path / "c.pem", key=tmp_path / "k.pem")):
        with pytest.raises(UsageError, match="need tls_ca"):
            AggregatorSettings(tmp_path, tls=tls, **rule)

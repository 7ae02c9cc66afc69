"""The audit log of a running aggregator has every change and every kind of refusal, and no secret."""

import asyncio
import threading

import pytest

from fedgrpc.errors import FedgrpcError, NotFound, TokenRefused, WrongIdentity
from fedgrpc.identity.audit import AUDIT_FILE
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, identity_pb2
from fedgrpc.worker.enrolment import join
from tests.support.audit_lines import verified
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice
from tests.support.joining import OUTSIDE, connected, identity_stub, joined, new_token, operator, revoke
from tests.support.running_federation import running_aggregator


def recorded(running):
    """The records of the log so far, whose seals are checked on the way."""
    path = running.settings.data_dir / "identity" / AUDIT_FILE
    return [record for record, _ in verified(path.read_bytes().splitlines(keepends=True))]


async def test_joining_and_revoking_are_recorded_with_who_and_what(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        await joined(running, tmp_path, "pi-7", names="pi-*")
        await revoke(running, "pi-7", why="stolen")
        created, enrolled, revoked = recorded(running)
    assert created["who"] == "a local caller"
    assert created["what"] == "Identity/CreateToken"
    assert created["about"]["role"] == "ROLE_TRAINER"
    assert created["about"]["names"] == "pi-*"
    assert enrolled["what"] == "Identity/Enroll"
    assert enrolled["about"] == {"name": "pi-7", "member": "pi-7", "token": created["about"]["token"]}
    assert "127.0.0.1" in enrolled["from"]
    assert revoked["about"] == {"name": "pi-7", "why": "stolen"}
    assert {record["result"] for record in (created, enrolled, revoked)} == {"ok"}


async def test_an_operators_actions_on_a_run_are_recorded_under_her_name(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        tls = await operator(running, tmp_path, "alice", "operator")
        async with connected(running, tls) as channel:
            stub = aggregator_pb2_grpc.AggregatorStub(channel)
            await stub.PauseRun(pb.PauseRunRequest())
        *_, paused = recorded(running)
    assert paused["who"] == "the operator 'alice'"
    assert paused["what"] == "Aggregator/PauseRun"


async def test_calls_that_are_refused_are_recorded_with_the_reason(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "pi-7")
        before = len(recorded(running))
        async with connected(running, tls) as channel:
            stub = aggregator_pb2_grpc.AggregatorStub(channel)
            with pytest.raises(WrongIdentity), domain_errors():
                await stub.StopRun(pb.StopRunRequest())
            with pytest.raises(WrongIdentity), domain_errors():
                await HandDrivenDevice(stub, "pi-8").register()
        async with identity_stub(running) as stub:
            with pytest.raises(NotFound), domain_errors():
                await stub.RevokeMember(identity_pb2.RevokeMemberRequest(name="nobody"))
        role, name, missing = recorded(running)[before:]
    assert (role["who"], role["what"]) == ("the trainer 'pi-7'", "Aggregator/StopRun")
    assert role["result"].startswith("WrongIdentity: ")
    assert name["what"] == "Aggregator/Register"
    assert "pi-8" in name["result"]
    assert missing["about"] == {"name": "nobody"}
    assert missing["result"].startswith("NotFound: ")


async def test_a_caller_whose_certificate_counts_for_nothing_is_recorded_as_unknown(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "pi-7")
        async with identity_stub(running) as stub:
            await stub.ForgetMember(identity_pb2.ForgetMemberRequest(name="pi-7"))
        async with connected(running, tls) as channel:
            device = HandDrivenDevice(aggregator_pb2_grpc.AggregatorStub(channel), "pi-7")
            for _ in range(3):
                with pytest.raises(Exception, match="forgotten"), domain_errors():
                    await device.register()
        records = [each for each in recorded(running) if each["what"] == "Aggregator/Register"]
    assert [each["who"] for each in records] == ["an unknown caller"]
    assert records[0]["result"].startswith("NotEnrolled: ")


async def test_no_secret_is_recorded(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        text = await new_token(running)
        content = (running.settings.data_dir / "identity" / AUDIT_FILE).read_text()
    assert text.split(".")[-1] not in content
    assert text.split(".")[-2] in content


async def test_a_change_whose_caller_hangs_up_is_made_whole_and_recorded(tmp_path, monkeypatch):
    """Else who hangs up in time would join unrecorded, and with one use of a token as often as they like."""
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        token = JoinToken.parse(await new_token(running, uses=1))
        store = running.aggregator.trust.identities._store
        begun, let_go, save = threading.Event(), threading.Event(), store.save

        def slow(*arguments):
            first = not begun.is_set()
            begun.set()
            if first:
                let_go.wait(PATIENCE_S)
            save(*arguments)

        monkeypatch.setattr(store, "save", slow)
        first = asyncio.create_task(join(running.address, token, "pi-1", DeviceFolder(tmp_path / "pi-1")))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.create_task(join(running.address, token, "pi-2", DeviceFolder(tmp_path / "pi-2")))
        await asyncio.wait([second], timeout=1.0)
        let_go.set()
        with pytest.raises(TokenRefused, match="used up"):
            await second
        assert [member.name for member in running.aggregator.trust.identities.members()] == ["pi-1"]
        enrolled, refused = (each for each in recorded(running) if each["what"] == "Identity/Enroll")
    assert (enrolled["about"]["member"], enrolled["result"]) == ("pi-1", "ok")
    assert "used up" in refused["result"]


async def test_a_change_that_fails_for_any_reason_is_recorded(tmp_path, monkeypatch):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:

        def broken(*_):
            raise RuntimeError("a mistake of ours")

        monkeypatch.setattr(running.aggregator.trust.identities, "revoke", broken)
        with pytest.raises(FedgrpcError), domain_errors():
            await revoke(running, "pi-7")
        *_, failed = recorded(running)
    assert (failed["what"], failed["result"]) == ("Identity/RevokeMember", "internal error")

"""Devices that join with a token, over TLS, from joining to renewal; and what bad tokens and strangers get."""

import asyncio
import dataclasses
import shutil
import time

import grpc.aio
import pytest
import structlog

from fedgrpc.errors import (
    CertificateStale,
    LinkError,
    NameTaken,
    NotEnrolled,
    StateCopied,
    StorageError,
    TokenRefused,
    UsageError,
    WrongIdentity,
)
from fedgrpc.identity.access import ROLES
from fedgrpc.identity.certificates import load_chain_der
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.roles import DEVICE_ROLES, OPERATOR_ROLES
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.diagnosis import explain, presented_chain
from fedgrpc.rpc.retry import Backoff
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, device_pb2, identity_pb2, identity_pb2_grpc, round_pb2
from fedgrpc.worker import enrolment
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.enrolment import join
from fedgrpc.worker.process import Worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice, encoded, update_of
from tests.support.joining import (
    OUTSIDE,
    connected,
    identity_stub,
    joined,
    new_token,
    operator,
    pass_certificate_time,
)
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.running_hierarchy import running_leaf

ONE = {"min_workers": 1, "selection_window_s": 0.1}


def stub_of(channel):
    return aggregator_pb2_grpc.AggregatorStub(channel)


@pytest.mark.faults
async def test_a_worker_joins_once_works_and_later_starts_without_the_token(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as running:
        token = await new_token(running, names="pi-7")
        worker = start_worker(running, tmp_path, "raspberrypi", ShiftTrainer(), join=token)
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        assert [task.worker for task in (await running.round(1)).tasks] == ["pi-7"]
        assert (
            await asyncio.wait_for(start_worker(running, tmp_path, "raspberrypi", ShiftTrainer()), PATIENCE_S) == 0
        )
        # The service file of a device may keep its token.
        again = start_worker(running, tmp_path, "raspberrypi", ShiftTrainer(), join=token)
        assert await asyncio.wait_for(again, PATIENCE_S) == 0


async def test_a_token_makes_an_evaluator_of_a_worker_that_said_nothing(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        token = await new_token(running, "evaluator")
        worker = start_worker(running, tmp_path, "e", ShiftTrainer(), join=token)
        await running.until_known("e")
        known = running.aggregator.coordinator.fleet.get("e")
        assert known.registration.role == device_pb2.WORKER_ROLE_EVALUATOR
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)


async def test_strangers_reach_nothing_and_are_told_how_to_join(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running, running_aggregator_of_others(tmp_path) as other:
        foreign = await joined(other, tmp_path / "foreign", "pi-1")
        address = Address.parse(running.address)
        for tls in (None, foreign):
            async with open_channel(running.address, tls) as channel:
                with pytest.raises(LinkError), domain_errors():
                    await stub_of(channel).GetRun(pb.GetRunRequest())
        assert "--join TOKEN" in await asyncio.to_thread(explain, address, None)
        assert "not the aggregator that was joined" in await asyncio.to_thread(explain, address, foreign)


def running_aggregator_of_others(tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    return running_aggregator(folder, **OUTSIDE)


async def test_bad_tokens_get_one_clear_line_and_leave_nothing_behind(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running, running_aggregator_of_others(tmp_path) as other:
        good = await new_token(running, names="pi-*")
        parsed = JoinToken.parse(good)
        used_up = await new_token(running, ttl_s=10_000)
        await join(running.address, JoinToken.parse(used_up), "first", DeviceFolder(tmp_path / "first"))
        expired = await new_token(running, ttl_s=1000)
        deleted = await new_token(running, ttl_s=10_000)
        async with identity_stub(running) as stub:
            await stub.DeleteToken(identity_pb2.DeleteTokenRequest(id=JoinToken.parse(deleted).id))
        wrong = JoinToken(parsed.authority_sha256, parsed.id, "A" * 32).text
        pass_certificate_time(running, 601)
        still_good = await new_token(running, names="pi-*")
        bad = [
            (used_up, "used up"),
            (expired[:-3], "cut off"),
            (deleted, "was deleted"),
            (wrong, "secret is wrong"),
            (await new_token(other), "another authority"),
            (good, "expired"),
            ("hello", "no join token"),
        ]
        for number, (text, reason) in enumerate(bad):
            with pytest.raises(TokenRefused, match=reason) as caught:
                await asyncio.wait_for(
                    start_worker(running, tmp_path, f"w{number}", ShiftTrainer(), join=text), 60
                )
            assert text[-20:] not in str(caught.value)
        with pytest.raises(TokenRefused, match=r"for the names pi-\*"):
            await start_worker(running, tmp_path, "jetson", ShiftTrainer(), join=still_good)
        assert {member.name for member in running.aggregator.trust.identities.members()} == {"first"}


async def test_nothing_is_sent_to_an_aggregator_that_is_not_the_token_s(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running, running_aggregator_of_others(tmp_path) as other:
        token = JoinToken.parse(await new_token(other))
        with structlog.testing.capture_logs() as logs, pytest.raises(TokenRefused, match="nothing was sent"):
            await join(running.address, token, "pi-7", DeviceFolder(tmp_path / "pi-7"))
        assert not logs
        # Not even a key has been made for it.
        assert not (tmp_path / "pi-7").exists()


async def test_a_second_device_of_the_same_name_is_refused_and_the_first_goes_on(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        token = await new_token(running, uses=5)
        await join(running.address, JoinToken.parse(token), "pi-7", DeviceFolder(tmp_path / "one"))
        with pytest.raises(NameTaken, match="another key is enrolled"):
            await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer(), join=token), 60)


@pytest.mark.parametrize("ingest", [0, 1])
async def test_every_role_may_call_what_the_table_says_and_nothing_else(tmp_path, ingest):
    async with running_aggregator(tmp_path, ingest=ingest, **OUTSIDE) as running:
        callers = {role: await joined(running, tmp_path, f"d-{role}", role) for role in DEVICE_ROLES}
        callers |= {role: await operator(running, tmp_path, f"o-{role}", role) for role in OPERATOR_ROLES}
        stubs = {
            "fedgrpc.v1.Aggregator": (aggregator_pb2_grpc.AggregatorStub, pb),
            "fedgrpc.v1.Identity": (identity_pb2_grpc.IdentityStub, identity_pb2),
        }
        tried = 0
        for role, tls in callers.items():
            async with connected(running, tls) as channel:
                for method, roles in ROLES.items():
                    _, service, name = method.split("/")
                    if service in stubs:
                        stub, module = stubs[service]
                        refused = await is_refused(getattr(stub(channel), name), getattr(module, f"{name}Request"))
                        assert refused == (role not in roles), (role, method)
                        tried += 1
        assert tried == len(callers) * len([method for method in ROLES if method.split("/")[1] in stubs])


async def is_refused(call, request):
    """Whether the role may not make the call; how a call that it may make ends is no matter here."""
    streams = isinstance(call, (grpc.aio.StreamUnaryMultiCallable, grpc.aio.StreamStreamMultiCallable))
    made = call(timeout=PATIENCE_S) if streams else call(request(), timeout=PATIENCE_S)
    stream = ClientStream(made)
    try:
        if streams:
            await stream.write(request())
        if isinstance(call, (grpc.aio.UnaryStreamMultiCallable, grpc.aio.StreamStreamMultiCallable)):
            await stream.read()
            made.cancel()
        else:
            await (stream.finish() if streams else made)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.PERMISSION_DENIED and "may not call" in error.details()
    return False


async def test_a_device_cannot_act_as_another_nor_in_another_role(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        victim = await joined(running, tmp_path, "victim")
        stranger = await joined(running, tmp_path, "stranger")
        async with connected(running, victim) as mine, connected(running, stranger) as theirs:
            await HandDrivenDevice(stub_of(mine), "victim").register()
            as_victim = HandDrivenDevice(stub_of(theirs), "victim")
            task = pb.Task(token="t")
            for call in (
                as_victim.register(),
                as_victim.poll(),
                as_victim.beat(task),
                as_victim.push(task),
                as_victim.held(task),
                as_victim.give_back(task),
                stub_of(theirs).Leave(pb.LeaveRequest(worker="victim")),
            ):
                with pytest.raises(WrongIdentity, match="does not speak for worker 'victim'"), domain_errors():
                    await call
            device = HandDrivenDevice(stub_of(theirs), "stranger")
            for role in (device_pb2.WORKER_ROLE_EVALUATOR, device_pb2.WORKER_ROLE_AGGREGATOR):
                with pytest.raises(WrongIdentity, match="is a trainer by its certificate"), domain_errors():
                    await device.register(role=role)
            await device.register()
            with pytest.raises(WrongIdentity, match="with the token of a task"), domain_errors():
                await stub_of(theirs).PullModel(pb.PullModelRequest(worker="stranger")).read()


async def test_a_device_that_needs_approval_waits_and_then_works(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as running:
        token = await new_token(running, needs_approval=True)
        settings = worker_settings(running, tmp_path, "pi-7", join=token)
        worker = Worker(settings, lambda _: ShiftTrainer())
        working = asyncio.create_task(worker.run())
        await until(lambda: "device approve pi-7" in worker.publisher.status.last_error)
        async with identity_stub(running) as stub:
            await stub.ApproveMember(identity_pb2.ApproveMemberRequest(name="pi-7"))
        assert await asyncio.wait_for(working, PATIENCE_S) == 0


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a status that lasts
            await asyncio.sleep(0.02)


def worker_settings(running, folder, name, **changes):
    values = {"serve_address": None, "backoff": Backoff(0.05, 0.5), "poll_wait_s": 5.0, **changes}
    return WorkerSettings(name=name, aggregator=running.address, state_dir=folder / name, **values)


async def test_certificates_renew_themselves_while_rounds_go_on(tmp_path):
    """Each lives for a second: every round has calls over several connections."""
    async with running_aggregator(tmp_path, rounds=40, policy=ONE, certificate_life_s=1.0, **OUTSIDE) as running:
        token = await new_token(running)
        worker = start_worker(running, tmp_path, "pi-7", SlowTrainer(), join=token)
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        (member,) = running.aggregator.trust.identities.members()
        assert member.expires_at - member.joined_at >= 2.0
        for record in await running.rounds():
            assert [task.phase for task in record.tasks] == [round_pb2.TASK_PHASE_ACCEPTED]


class SlowTrainer(ShiftTrainer):
    def train(self, weights, job):
        time.sleep(0.08)
        return super().train(weights, job)


async def test_a_renewal_during_an_upload_does_not_touch_it(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, **OUTSIDE) as running:
        tls = await joined(running, tmp_path / "pi-7", "identity")
        settings = worker_settings(running, tmp_path, "pi-7", tls=tls)
        async with enrolment.linked(dataclasses.replace(settings, name="identity")) as link:
            client = link.serve(AggregatorClient(link.channel, "identity"))
            device = HandDrivenDevice(stub_of(link.channel), "identity")
            await device.register()
            task = await device.task()
            former = link.channel
            renewed = asyncio.Event()
            loop = asyncio.get_running_loop()

            def read(offset, size):
                if not renewed.is_set():
                    asyncio.run_coroutine_threadsafe(link.renew(), loop).result(PATIENCE_S)
                    loop.call_soon_threadsafe(renewed.set)
                return payload[offset : offset + size]

            manifest, payload = encoded(update_of(), "raw")
            header = device.header(task, manifest)
            assert await client.pushes.push(header, read, 0)
            assert link.channel is not former
            assert (await client.pushes.query_push(task.token)).complete


async def test_a_worker_whose_certificate_is_past_its_life_renews_and_goes_on(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, rounds=1, **OUTSIDE) as running:
        tls = await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        pass_certificate_time(running, 10 * 86_400)
        async with connected(running, tls) as channel:
            with pytest.raises(CertificateStale, match="renew"), domain_errors():
                await HandDrivenDevice(stub_of(channel), "pi-7").register()
        assert await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer()), PATIENCE_S) == 0


async def test_a_worker_that_was_off_for_longer_than_the_grace_joins_with_a_new_token(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, rounds=1, renewal_grace_s=60.0, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        pass_certificate_time(running, 10 * 86_400)
        with pytest.raises(NotEnrolled, match="join with a new token"):
            await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer()), PATIENCE_S)
        token = await new_token(running, names="pi-7")
        worker = start_worker(running, tmp_path, "pi-7", ShiftTrainer(), join=token)
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0


async def test_an_authority_that_was_replaced_is_said_so_and_a_new_token_helps(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, rounds=1, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
    shutil.rmtree(running.settings.data_dir / "identity")
    async with running_aggregator(tmp_path, policy=ONE, rounds=1, **OUTSIDE) as running:
        worker = Worker(worker_settings(running, tmp_path, "pi-7"), lambda _: ShiftTrainer())
        working = asyncio.create_task(worker.run())
        await until(lambda: "authority was replaced" in worker.publisher.status.last_error)
        worker.stop()
        await working
        token = await new_token(running, names="pi-7")
        again = start_worker(running, tmp_path, "pi-7", ShiftTrainer(), join=token)
        assert await asyncio.wait_for(again, PATIENCE_S) == 0


async def test_an_aggregator_whose_authority_is_missing_makes_no_other_while_it_has_members(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
    (kept,) = (running.settings.data_dir / "identity").glob("authorit*")
    kept.rename(tmp_path / "backup")
    with pytest.raises(StorageError, match="bring it back from a backup"):
        async with running_aggregator(tmp_path, policy=ONE, **OUTSIDE):
            pass
    (tmp_path / "backup").rename(kept)
    async with running_aggregator(tmp_path, policy=ONE, rounds=1, **OUTSIDE) as running:
        assert await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer()), PATIENCE_S) == 0


async def test_a_restored_identity_folder_makes_another_machine_the_same_aggregator(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, rounds=1, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(running.settings.data_dir / "identity", elsewhere / "aggregator" / "identity")
    (elsewhere / "aggregator").chmod(0o700)
    async with running_aggregator(elsewhere, policy=ONE, rounds=1, **OUTSIDE) as running:
        assert await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer()), PATIENCE_S) == 0


async def test_a_lost_key_ends_the_worker_with_a_line_that_says_what_to_do(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        (tmp_path / "pi-7" / "identity" / "key.pem").unlink()
        with pytest.raises(StorageError, match="key of this device's certificate is lost"):
            await start_worker(running, tmp_path, "pi-7", ShiftTrainer())


async def test_of_two_devices_with_the_same_disk_the_second_is_told_that_it_is_a_copy(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        token = await new_token(running, names="pi-7")
        first = start_worker(running, tmp_path, "pi-7", ShiftTrainer(), join=token)
        await running.until_known("pi-7")
        await running.until_polling("pi-7")
        shutil.copytree(tmp_path / "pi-7", tmp_path / "copy")
        with pytest.raises(StateCopied, match="same state folder"):
            await asyncio.wait_for(start_worker(running, tmp_path, "copy", ShiftTrainer()), PATIENCE_S)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_certificates_are_valid_on_a_device_whose_clock_begins_in_1970(tmp_path, monkeypatch):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        monkeypatch.setattr(enrolment, "_wall_clock", lambda: 60.0)
        with structlog.testing.capture_logs() as logs:
            await joined(running, tmp_path, "pi-7")
        (wrong,) = (each for each in logs if each["event"] == "this machine's clock is wrong")
        assert wrong["behind_s"] > 1_000_000_000
        chain = load_chain_der(await asyncio.to_thread(presented_chain, Address.parse(running.address)))
        device = DeviceFolder(tmp_path / "pi-7").own_certificate()
        assert {each.not_valid_before_utc.year for each in (*chain, device)} == {1970}


@pytest.mark.parametrize("ingest", [0, 1])
async def test_a_token_that_is_deleted_opens_no_further_connection(tmp_path, ingest):
    async with running_aggregator(tmp_path, ingest=ingest, **OUTSIDE) as running:
        token = JoinToken.parse(await new_token(running, uses=5))
        await join(running.address, token, "a", DeviceFolder(tmp_path / "a"))
        async with identity_stub(running) as stub:
            await stub.DeleteToken(identity_pb2.DeleteTokenRequest(id=token.id))
        with pytest.raises(TokenRefused, match="deleted"):
            await join(running.address, token, "b", DeviceFolder(tmp_path / "b"))


async def test_loopback_stays_plain_and_has_no_authority(tmp_path):
    async with running_aggregator(tmp_path) as running:
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING
        assert not (running.settings.data_dir / "identity" / "authorities.pem").exists()
        with pytest.raises(UsageError, match="no authority of its own"), domain_errors():
            await new_token(running)


async def test_insecure_lets_anybody_call_and_says_so(tmp_path):
    with structlog.testing.capture_logs() as logs:
        async with running_aggregator(tmp_path, insecure=True, **OUTSIDE) as running:
            await running.device("anybody")
            await until(lambda: any(each["event"] == "anybody may call" for each in logs))


async def test_a_leaf_joins_its_parent_as_any_device_does(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as root:
        token = await new_token(root, "leaf")
        async with running_leaf(tmp_path / "below", "leaf", root, policy=ONE, join=token, **OUTSIDE) as leaf:
            own = await new_token(leaf)
            worker = start_worker(leaf, tmp_path, "pi-7", ShiftTrainer(), join=own)
            assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        assert [task.worker for task in (await root.round(1)).tasks] == ["leaf"]
        assert root.aggregator.coordinator.fleet.get("leaf").registration.role == WorkerRole.AGGREGATOR.value


async def test_of_devices_that_join_at_once_a_token_admits_as_many_as_it_has_uses(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        token = JoinToken.parse(await new_token(running, uses=3))
        joining = (join(running.address, token, f"pi-{n}", DeviceFolder(tmp_path / f"pi-{n}")) for n in range(6))
        ended = await asyncio.gather(*joining, return_exceptions=True)
        assert ended.count(None) == 3
        assert all(isinstance(each, TokenRefused) for each in ended if each is not None)
        assert len(running.aggregator.trust.identities.members()) == 3

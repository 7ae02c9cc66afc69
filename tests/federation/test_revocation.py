"""Revocation: refused at the next call, out of open streams, and, if wanted, out of the round's updates."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.errors import FedgrpcError, WrongIdentity
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, device_pb2, identity_pb2, identity_pb2_grpc, round_pb2
from tests.support.hand_driven_device import MODEL, PATIENCE_S, HandDrivenDevice, chunks, encoded, update_of
from tests.support.joining import (
    OUTSIDE,
    connected,
    identity_stub,
    joined,
    operator,
    pass_certificate_time,
    revoke,
)
from tests.support.many_runs import QUICK, hosting
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

TWO = {"min_workers": 2, "selection_window_s": 0.1}


def device_of(channel, name):
    return HandDrivenDevice(aggregator_pb2_grpc.AggregatorStub(channel), name)


async def test_a_revoked_device_is_refused_at_its_next_call(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "pi-7")
        async with connected(running, tls) as channel:
            device = device_of(channel, "pi-7")
            await device.register()
            member = await revoke(running, "pi-7", why="stolen")
            assert member.state == identity_pb2.MEMBER_STATE_REVOKED
            with pytest.raises(WrongIdentity, match="revoked: stolen"), domain_errors():
                await device.register()
        async with connected(running, tls) as channel:
            with pytest.raises(WrongIdentity, match="revoked"), domain_errors():
                await device_of(channel, "pi-7").register()


@pytest.mark.parametrize("ingest", [0, 1])
async def test_an_open_poll_and_an_open_watch_end_with_their_caller(tmp_path, ingest):
    async with running_aggregator(tmp_path, ingest=ingest, **OUTSIDE) as running:
        device_tls = await joined(running, tmp_path, "pi-7")
        viewer_tls = await operator(running, tmp_path, "alice", "viewer")
        async with connected(running, device_tls) as one, connected(running, viewer_tls) as two:
            device = device_of(one, "pi-7")
            await device.register()
            polling = asyncio.create_task(device.poll(60.0))
            await running.until_polling("pi-7")
            watching = aggregator_pb2_grpc.AggregatorStub(two).WatchRounds(pb.WatchRoundsRequest())
            await watching.__aiter__().__anext__()
            for name in ("pi-7", "alice"):
                await revoke(running, name)
            with pytest.raises(WrongIdentity, match="revoked"), domain_errors():
                await asyncio.wait_for(polling, PATIENCE_S)
            with pytest.raises(WrongIdentity, match="revoked"), domain_errors():
                await asyncio.wait_for(all_of(watching), PATIENCE_S)


async def all_of(call):
    return [message async for message in call]


@pytest.mark.parametrize("ingest", [0, 1])
async def test_an_upload_in_progress_ends_and_the_others_commit_without_it(tmp_path, ingest):
    async with running_aggregator(tmp_path, policy=TWO | {"quorum": 1}, ingest=ingest, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "bad")
        async with connected(running, tls) as channel:
            bad, good = device_of(channel, "bad"), await running.device("good")
            await bad.register()
            task, other = await asyncio.gather(bad.task(), good.task())
            manifest, payload = encoded(update_of(), "raw")
            stream = ClientStream(bad.stub.PushUpdate(timeout=PATIENCE_S))
            await stream.write(pb.PushUpdateRequest(header=bad.header(task, manifest)))
            await stream.write(next(iter(chunks(payload[: len(payload) // 2]))))
            await running.until_task("bad", round_pb2.TASK_PHASE_UPLOADING)
            await revoke(running, "bad", why="stolen")
            with pytest.raises(WrongIdentity, match="stolen"), domain_errors():
                await stream.finish()
            await good.push(other)
            record = await running.until_ended(1)
        phases = {each.worker: each.phase for each in record.tasks}
        assert record.phase == round_pb2.ROUND_PHASE_COMMITTED
        assert phases["bad"] == round_pb2.TASK_PHASE_FAILED
        assert not [name for name in running.kept_updates() if task.token in name]


@pytest.mark.parametrize("ingest", [0, 1])
async def test_a_download_that_waits_for_its_link_ends_with_the_reason(tmp_path, ingest):
    # More than a connection takes before anybody reads.
    save_file({"w": np.zeros(16 << 20, np.float32)}, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, policy={"min_workers": 1}, ingest=ingest, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "pi-7")
        async with connected(running, tls) as channel:
            device = device_of(channel, "pi-7")
            await device.register()
            task = await device.task()
            pull = device.stub.PullModel(pb.PullModelRequest(worker="pi-7", token=task.token))
            await pull.initial_metadata()
            await asyncio.sleep(0.3)
            await revoke(running, "pi-7", why="stolen")
            with pytest.raises(WrongIdentity, match="stolen"), domain_errors():
                await asyncio.wait_for(all_of(pull), PATIENCE_S)


@pytest.mark.parametrize("drop", [True, False])
async def test_accepted_updates_of_an_open_round_are_dropped_if_the_operator_says_so(tmp_path, drop):
    policy = TWO | {"quorum": 1, "min_workers": 2, "min_sample_size": 2}
    async with running_aggregator(tmp_path, policy=policy, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "bad")
        async with connected(running, tls) as channel:
            bad, good = device_of(channel, "bad"), await running.device("good")
            await bad.register()
            task, other = await asyncio.gather(bad.task(), good.task())
            await bad.push(task, update_of(100.0))
            await revoke(running, "bad", why="stolen", drop_updates=drop)
            await good.push(other, update_of(1.0))
        if drop:
            assert not [name for name in running.kept_updates() if task.token in name]
            running.pass_time(1000.0)
        record = await running.until_ended(1)
    phases = {each.worker: each.phase for each in record.tasks}
    assert phases["good"] == round_pb2.TASK_PHASE_ACCEPTED
    assert phases["bad"] == (round_pb2.TASK_PHASE_REJECTED if drop else round_pb2.TASK_PHASE_ACCEPTED)
    assert float(running.weights(2)["w"].mean()) == pytest.approx(1.0 if drop else 50.5, rel=1e-5)


async def test_a_worker_that_is_revoked_ends_with_the_reason(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        worker = start_worker(running, tmp_path, "pi-7", ShiftTrainer())
        await running.until_known("pi-7")
        await revoke(running, "pi-7", why="stolen")
        with pytest.raises(FedgrpcError, match="revoked: stolen"):
            await asyncio.wait_for(worker, PATIENCE_S)


async def test_a_list_of_workers_shows_who_was_revoked(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        for name in ("pi-7", "pi-8"):
            tls = await joined(running, tmp_path / name, "identity", names=name)
            async with connected(running, tls) as channel:
                await device_of(channel, name).register()
        await revoke(running, "pi-7")
        workers = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert {each.worker: each.state for each in workers} == {
            "pi-7": pb.WORKER_STATE_REVOKED,
            "pi-8": pb.WORKER_STATE_IDLE,
        }


@pytest.mark.parametrize("ingest", [0, 1])
async def test_calls_of_a_certificate_past_its_life_end_too(tmp_path, ingest):
    async with running_aggregator(tmp_path, ingest=ingest, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "pi-7")
        async with connected(running, tls) as channel:
            device = device_of(channel, "pi-7")
            await device.register()
            polling = asyncio.create_task(device.poll(60.0))
            await running.until_polling("pi-7")
            pass_certificate_time(running, 86_401)
            running.aggregator.trust.admission.end_stale_calls()
            with pytest.raises(FedgrpcError, match="past its life"), domain_errors():
                await asyncio.wait_for(polling, PATIENCE_S)


async def test_an_operator_revokes_and_an_admin_also_admits_over_the_network(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        await joined(running, tmp_path, "pi-7")
        tls = await operator(running, tmp_path, "root", "admin")
        async with connected(running, tls) as channel:
            stub = identity_pb2_grpc.IdentityStub(channel)
            await stub.RevokeMember(identity_pb2.RevokeMemberRequest(name="pi-7"))
            await stub.ForgetMember(identity_pb2.ForgetMemberRequest(name="pi-7"))
            listed = await stub.ListMembers(identity_pb2.ListMembersRequest())
            assert [member.name for member in listed.members] == ["root"]


async def test_the_evaluators_of_a_leaf_leave_with_it(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        tls = await joined(running, tmp_path, "leaf", "leaf")
        async with connected(running, tls) as channel:
            await device_of(channel, "leaf").register(role=device_pb2.WORKER_ROLE_AGGREGATOR)
            await device_of(channel, "leaf.evaluators").register(role=device_pb2.WORKER_ROLE_EVALUATOR)
            await revoke(running, "leaf")
        fleet = running.aggregator.coordinator.fleet
        assert [fleet.get(name).left for name in ("leaf", "leaf.evaluators")] == [True, True]


async def test_an_operator_does_not_put_other_operators_out(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        await operator(running, tmp_path, "root", "admin")
        await joined(running, tmp_path, "pi-7")
        tls = await operator(running, tmp_path, "alice", "operator")
        async with connected(running, tls) as channel:
            stub = identity_pb2_grpc.IdentityStub(channel)
            with pytest.raises(WrongIdentity, match="takes an admin"), domain_errors():
                await stub.RevokeMember(identity_pb2.RevokeMemberRequest(name="root"))
            await stub.RevokeMember(identity_pb2.RevokeMemberRequest(name="pi-7"))


async def test_members_are_listed_in_pages(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        for number in range(5):
            await operator(running, tmp_path, f"o{number}", "viewer")
        names, token = [], ""
        async with identity_stub(running) as stub:
            while True:
                page = await stub.ListMembers(identity_pb2.ListMembersRequest(page_size=2, page_token=token))
                names += [member.name for member in page.members]
                if not (token := page.next_page_token):
                    break
        assert names == [f"o{number}" for number in range(5)]


async def test_a_revoked_device_loses_its_tasks_and_updates_in_each_run(tmp_path):
    save_file(MODEL, tmp_path / "initial.safetensors")
    quick = {**QUICK, "initial_model": str(tmp_path / "initial.safetensors")}
    async with hosting(tmp_path, address=OUTSIDE["address"]) as (address, client, aggregator):
        await client.submit("a", {**quick, "min_workers": "2", "priority": "5"})
        running = SimpleNamespace(address=address, settings=SimpleNamespace(data_dir=tmp_path / "aggregator"))
        tls = [await joined(running, tmp_path, name) for name in ("good", "bad")]
        async with connected(running, tls[0]) as one, connected(running, tls[1]) as two:
            good, bad = (device_of(channel, name) for channel, name in ((one, "good"), (two, "bad")))
            await asyncio.gather(good.register(many_runs=True), bad.register(many_runs=True))
            _, task = await asyncio.gather(task_of(good), task_of(bad))
            assert (await bad.push(task, update_of(1.0))).complete
            await client.submit("b", {**quick, "min_workers": "1"})
            other = await task_of(bad)
            assert (task.terms.run, other.terms.run) == ("a", "b")
            await client.identities.revoke("bad", "stolen", drop_updates=True)
            for name in ("a", "b"):
                (held,) = [each for each in await tasks_now(client.of(name)) if each.worker == "bad"]
                assert (name, held.phase) in (
                    ("a", round_pb2.TASK_PHASE_REJECTED),
                    ("b", round_pb2.TASK_PHASE_FAILED),
                )
                assert "revoked" in held.reason
            assert not any("bad" in run.coordinator.machine.leases for run in aggregator.runs)


async def task_of(device):
    """The next task of a device that serves many runs: it gets ready for those that it is told of."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await device.poll()
            if reply.HasField("task"):
                return reply.task
            if reply.HasField("introduce"):
                await device.stub.DescribeModel(
                    pb.DescribeModelRequest(worker=device.name, run_id=reply.introduce.run_id)
                )


async def tasks_now(client):
    """The tasks of the round in progress of a run."""
    async with aclosing(client.watch()) as watched:
        return (await anext(watched)).round.tasks

"""The built-in authority is rotated and retired while a run proceeds, with real workers over TLS."""

import asyncio
import time

import pytest

from fedgrpc.errors import IllegalTransition, TokenRefused
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import identity_pb2 as pb
from fedgrpc.v1 import round_pb2
from fedgrpc.v1.aggregator_pb2_grpc import AggregatorStub
from fedgrpc.worker.enrolment import join, joined_tls
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice
from tests.support.joining import (
    OUTSIDE,
    connected,
    identity_stub,
    joined,
    new_token,
    pass_certificate_time,
)
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

NAMES = ("pi-1", "pi-2")
ONE = {"min_workers": 1, "selection_window_s": 0.1}


class SlowTrainer(ShiftTrainer):
    def train(self, weights, job):
        time.sleep(0.05)
        return super().train(weights, job)


async def rotate(running):
    async with identity_stub(running) as stub:
        return (await stub.RotateAuthority(pb.RotateAuthorityRequest())).authority.name


async def authorities(running):
    async with identity_stub(running) as stub:
        return list((await stub.ListAuthorities(pb.ListAuthoritiesRequest())).authorities)


async def retire(running, name, force=False):
    async with identity_stub(running) as stub:
        with domain_errors():
            await stub.RetireAuthority(pb.RetireAuthorityRequest(name=name, force=force))


async def until_all_have_moved(running):
    async with asyncio.timeout(PATIENCE_S):
        while (await authorities(running))[-1].members:  # noqa: ASYNC110 - a state that lasts
            await asyncio.sleep(0.05)


async def until_it_trusts_one(device):
    async with asyncio.timeout(PATIENCE_S):
        while len(device.authority_sha256s()) > 1:  # noqa: ASYNC110 - a state that lasts
            await asyncio.sleep(0.05)


async def running_on(running):
    """Wait until two further rounds have ended."""
    number = (await running.round()).number
    await running.until_ended(number + 2)


async def test_a_run_goes_on_through_a_rotation_and_a_retirement(tmp_path):
    """Certificates live for a second, so that workers renew during the run."""
    policy = {"min_workers": 2, "selection_window_s": 0.1}
    async with running_aggregator(
        tmp_path, rounds=10_000, policy=policy, certificate_life_s=1.0, **OUTSIDE
    ) as running:
        token = await new_token(running, uses=2)
        workers = {name: start_worker(running, tmp_path, name, SlowTrainer(), join=token) for name in NAMES}
        await running.until_ended(1)
        (old,) = await authorities(running)
        assert (old.members, old.tokens) == (2, 1)
        made = await rotate(running)
        assert [each.name for each in await authorities(running)] == [made, old.name]
        await until_all_have_moved(running)
        await retire(running, old.name)
        (left,) = await authorities(running)
        assert (left.name, left.members, left.tokens) == (made, 2, 0)
        for name in NAMES:
            await until_it_trusts_one(DeviceFolder(tmp_path / name / "identity"))
        await running_on(running)
        for name, worker in workers.items():
            assert DeviceFolder(tmp_path / name / "identity").server_name() == f"{made}.fedgrpc.internal"
            assert not worker.done()
        for record in await running.rounds():
            if record.phase == round_pb2.ROUND_PHASE_COMMITTED:
                assert [task.phase for task in record.tasks] == [round_pb2.TASK_PHASE_ACCEPTED] * 2
        # The service file of a device may name a token of an authority that is no more.
        await ended(workers.pop("pi-1"))
        workers["pi-1"] = start_worker(running, tmp_path, "pi-1", SlowTrainer(), join=token)
        await running_on(running)
        for worker in workers.values():
            await ended(worker)


async def ended(worker):
    assert not worker.done()
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def test_a_device_that_was_off_during_the_rotation_renews_in_grace(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        (old,) = await authorities(running)
        made = await rotate(running)
        pass_certificate_time(running, 10 * 86_400)
        with pytest.raises(IllegalTransition, match="pi-7"):
            await retire(running, old.name)
        assert await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer()), PATIENCE_S) == 0
        assert DeviceFolder(tmp_path / "pi-7" / "identity").server_name() == f"{made}.fedgrpc.internal"
        await retire(running, old.name)


async def test_tokens_of_both_authorities_admit_devices_and_those_of_a_retired_one_do_not(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        (old,) = await authorities(running)
        before = JoinToken.parse(await new_token(running, uses=9))
        made = await rotate(running)
        after = JoinToken.parse(await new_token(running, uses=9))
        for number, token in enumerate((before, after)):
            device = DeviceFolder(tmp_path / f"d{number}")
            await join(running.address, token, f"d{number}", device)
            assert device.authority_sha256s() == {before.authority_sha256, after.authority_sha256}
            async with connected(running, joined_tls(device)) as channel:
                await HandDrivenDevice(AggregatorStub(channel), f"d{number}").register()
        await retire(running, old.name)
        with pytest.raises(TokenRefused, match="another authority"):
            await join(running.address, before, "d2", DeviceFolder(tmp_path / "d2"))
        await join(running.address, after, "d3", DeviceFolder(tmp_path / "d3"))
        assert (await authorities(running))[0].name == made


async def test_an_aggregator_that_starts_again_during_a_rotation_knows_both_authorities(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        await rotate(running)
        known = [each.name for each in await authorities(running)]
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as running:
        assert [each.name for each in await authorities(running)] == known
        assert await asyncio.wait_for(start_worker(running, tmp_path, "pi-7", ShiftTrainer()), PATIENCE_S) == 0


async def test_a_forced_retirement_leaves_a_device_that_joins_again_with_a_new_token(tmp_path):
    async with running_aggregator(tmp_path, rounds=1, policy=ONE, **OUTSIDE) as running:
        await joined(running, tmp_path / "pi-7", "identity", names="pi-7")
        (old,) = await authorities(running)
        await rotate(running)
        await retire(running, old.name, force=True)
        token = await new_token(running, names="pi-7")
        worker = start_worker(running, tmp_path, "pi-7", ShiftTrainer(), join=token)
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0


async def test_a_rotation_is_in_the_audit_log(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        (old,) = await authorities(running)
        made = await rotate(running)
        await retire(running, old.name)
        async with identity_stub(running) as stub:
            lines = (await stub.ReadAudit(pb.ReadAuditRequest())).lines.decode()
        assert f'"authority":"{made}"' in lines.replace(" ", "")
        (retired,) = (line for line in lines.splitlines() if "Identity/RetireAuthority" in line)
        assert old.name in retired

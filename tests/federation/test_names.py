"""Two devices under one name: one is refused, both sides say why, and what is acknowledged is one's own."""

import asyncio
import shutil
import signal

import numpy as np
import pytest

from fedgrpc.rpc.identity import Session
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice, refused, update_of
from tests.support.learning_tasks import Recorded
from tests.support.processes import aggregator_process, worker_process
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

ONE = {"min_workers": 1}
CARD_1, CARD_2 = Session("card-1", "p1"), Session("card-2", "p2")


class Stub:
    """A stub that sends a session with each call."""

    def __init__(self, stub, session):
        self._stub, self._metadata = stub, session.metadata

    def __getattr__(self, name):
        call = getattr(self._stub, name)
        return lambda *request, **how: call(*request, **how, metadata=self._metadata)


def device(running, session, name="pi"):
    return HandDrivenDevice(Stub(running.stub, session), name)


async def test_each_call_of_a_second_device_is_refused_and_the_first_goes_on(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE) as running:
        first, second = device(running, CARD_1), device(running, CARD_2)
        await first.register()
        task = await first.task()
        calls = [second.register, second.poll, lambda: second.beat(task), lambda: second.held(task)]
        calls += [lambda: second.push(task), lambda: second.give_back(task)]
        calls += [lambda: second.stub.Leave(pb.LeaveRequest(worker="pi"))]
        for call in calls:
            with refused("ALREADY_EXISTS", "--name", "NameTaken"):
                await call()
        assert (await first.push(task)).complete
        await running.until_finished()


async def test_the_device_that_takes_a_name_over_never_gets_the_token_of_the_one_before(tmp_path):
    async with running_aggregator(tmp_path, policy={**ONE, "lease_s": 300.0}) as running:
        first, second = device(running, CARD_1), device(running, CARD_2)
        await first.register()
        old = await first.task()
        running.pass_time(301.0)
        await second.register()
        new = await second.task()
        assert new.token != old.token
        with refused("ALREADY_EXISTS", "--name", "NameTaken"):
            await first.push(old, update_of(7.0))
        assert (await second.push(new, update_of(2.0))).complete
        await running.until_finished()
        assert np.allclose(running.weights(2)["b"], 2.0)


async def test_a_name_is_kept_through_a_restart_of_the_aggregator(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE) as running:
        await device(running, CARD_1).register()
    async with running_aggregator(tmp_path, policy=ONE) as running:
        with refused("ALREADY_EXISTS", "--name"):
            await device(running, CARD_2).register()
        await device(running, CARD_1).register()


@pytest.mark.faults
async def test_the_second_of_two_workers_waits_and_says_why_and_takes_over_when_the_first_has_gone(tmp_path):
    for name in "ab":
        (tmp_path / f"data-{name}").mkdir()
    async with aggregator_process(tmp_path, "--min-workers", 1, "--rounds", 2, "--lease", "2s") as (
        aggregator,
        running,
    ):
        async with worker_process(running, tmp_path, "pi", tmp_path / "data-a") as first:
            (tmp_path / "data-a" / "wait").touch()
            await first.until("task started")
            other = ("--state-dir", tmp_path / "other")
            async with worker_process(running, tmp_path, "pi", tmp_path / "data-b", *other) as second:
                assert "--name" in (await second.until("disconnected"))["reason"]
                told = await aggregator.until("name refused", worker="pi")
                assert told["peer"].startswith("127.0.0.1:")
                assert told["holder"].startswith("127.0.0.1:")
                (tmp_path / "data-a" / "wait").unlink()
                await first.until("update acknowledged", round=1)
                first.send(signal.SIGKILL)
                # Of round 2, or of round 3 where the first had its task of round 2 already.
                await second.until("update acknowledged")
                await aggregator.until("name taken over", worker="pi")
        changes = Recorded.changes(tmp_path / "data-a")[0] + Recorded.changes(tmp_path / "data-b")[0]
        assert np.isclose(running.weights(3)["b"][0], changes)


@pytest.mark.faults
async def test_a_killed_worker_takes_over_from_itself_at_once(tmp_path):
    async with aggregator_process(tmp_path, "--min-workers", 1, "--rounds", 1) as (aggregator, running):
        data = tmp_path / "data"
        async with worker_process(running, tmp_path, "pi", data) as first:
            (data / "wait").touch()
            await first.until("task started")
            await first.until("connected")
            first.send(signal.SIGKILL)
            await first.ended()
        (data / "wait").unlink()
        async with worker_process(running, tmp_path, "pi", data) as second:
            await second.until("update acknowledged", round=1)
        assert not any(line["event"] in ("name refused", "name taken over") for line in aggregator.events)


@pytest.mark.faults
async def test_a_copied_state_folder_is_noticed_and_the_first_device_goes_on(tmp_path):
    async with aggregator_process(tmp_path, "--min-workers", 1, "--rounds", 1) as (aggregator, running):
        data, copied = tmp_path / "data", tmp_path / "copied"
        async with worker_process(running, tmp_path, "pi", data) as first:
            (data / "wait").touch()
            await first.until("task started")
            shutil.copytree(tmp_path / "pi", copied)
            async with worker_process(
                running, tmp_path, "pi", tmp_path / "data-2", "--state-dir", copied
            ) as second:
                assert await second.ended() == 1
                assert "copied" in second.events[-1]["event"]
            assert (await aggregator.until("name refused"))["worker"] == "pi"
            (data / "wait").unlink()
            await first.until("update acknowledged", round=1)


async def test_two_workers_in_one_process_under_one_name_do_not_share_a_task(tmp_path):
    async with running_aggregator(tmp_path, policy=ONE, rounds=3) as running:
        first = start_worker(running, tmp_path / "a", "pi", ShiftTrainer(1.0))
        second = start_worker(running, tmp_path / "b", "pi", ShiftTrainer(100.0))
        await running.until_finished()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        moved = running.weights(4)["b"][0]
        assert moved == pytest.approx(3.0) or moved == pytest.approx(300.0)

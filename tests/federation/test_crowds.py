"""Crowds that take without giving: names that only register, only poll, or never deliver."""

import asyncio

from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice, refused
from tests.support.running_federation import running_aggregator


async def test_a_new_device_finds_a_place_among_names_that_never_delivered_also_after_a_restart(tmp_path):
    for restart in range(2):
        async with running_aggregator(tmp_path, max_workers=3) as running:
            if not restart:
                for number in range(20):
                    await running.device(f"idle-{number}")
                assert len(running.aggregator.coordinator.fleet) == 3
            await running.device(f"honest-{restart}")
            assert len(running.aggregator.coordinator.fleet) == 3
            assert f"honest-{restart}" in {worker.name for worker in running.aggregator.coordinator.fleet}


async def test_a_name_that_changes_in_a_loop_is_told_to_wait_and_the_same_facts_cost_nothing(tmp_path):
    async with running_aggregator(tmp_path) as running:
        device = HandDrivenDevice(running.stub, "flip")
        for number in range(11):
            await device.register(device={"cpu_cores": number})
        with refused("RESOURCE_EXHAUSTED", "registers too often", "Exhausted") as caught:
            await device.register(device={"cpu_cores": 99})
        assert int(caught.trailers["grpc-retry-pushback-ms"]) > 0
        store, stored = running.aggregator.coordinator.store, []
        store.save_worker = lambda *about: stored.append(about)
        for _ in range(20):
            await device.register(device={"cpu_cores": 10})
        assert not stored


async def test_the_oldest_of_many_polls_of_one_worker_are_answered_with_nothing(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 9}, poll_wait_s=600.0) as running:
        device = await running.device("a")
        polls = [asyncio.create_task(device.poll(600.0)) for _ in range(10)]
        async with asyncio.timeout(PATIENCE_S):
            while sum(poll.done() for poll in polls) < 6:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
        assert not any(poll.result().HasField("task") for poll in polls if poll.done())
        for poll in polls:
            poll.cancel()


async def test_names_that_take_tasks_and_never_deliver_hold_up_two_rounds_and_no_third(tmp_path):
    policy = {"min_workers": 1, "deadline_s": 1.5, "selection_window_s": 1.0, "lease_s": 30.0}
    async with running_aggregator(tmp_path, rounds=6, policy=policy) as running:
        honest = await running.device("honest")
        idle = [await running.device(f"idle-{number}") for number in range(5)]

        async def take(device):
            """Poll, take, beat once, and give nothing back."""
            while not (reply := await device.poll()).run_ended:
                if reply.HasField("task"):
                    await device.beat(reply.task, round_pb2.TASK_PHASE_TRAINING)
                await asyncio.sleep(0.1)

        takers = [asyncio.create_task(take(device)) for device in idle]
        async with asyncio.timeout(PATIENCE_S):
            while not (reply := await honest.poll()).run_ended:
                if reply.HasField("task"):
                    await honest.push(reply.task)
        rounds = await running.rounds()
        held_up = [len(each.tasks) > 1 for each in rounds]
        assert held_up.count(True) <= 3
        assert not any(held_up[3:])
        await asyncio.gather(*takers)

"""A worker that ends says so: from then on nobody waits for it, neither the next round nor the end of the run.

Windows and leases are longer than any test waits.
"""

import asyncio
import threading

from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.retry import Backoff
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.process import Worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.running_federation import ShiftTrainer, running_aggregator
from tests.support.running_hierarchy import running_leaf

ALONE = {"min_workers": 1, "selection_window_s": 600.0, "lease_s": 10_000.0, "deadline_s": 20_000.0}


class Leaving:
    """A real worker that drains when it is told to."""

    def __init__(self, running, folder, name, role=WorkerRole.TRAINER):
        state = {"state_dir": folder / name, "serve_address": None, "backoff": Backoff(0.05, 0.5)}
        settings = WorkerSettings(name=name, aggregator=running.address, role=role, **state)
        self.worker = Worker(settings, lambda registration: ShiftTrainer())
        self.task = asyncio.create_task(self.worker.run())

    async def leave(self):
        self.worker.drain()
        assert await self.task == 0


async def test_a_round_does_not_wait_for_a_worker_that_has_left(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, policy={**ALONE, "min_workers": 2}) as running:
        staying, leaving = await running.device("staying"), Leaving(running, tmp_path, "leaving")
        task = await staying.task()
        # One that is told to drain while the answer to its poll is on the way would never hear of its task.
        await running.until_task("leaving", round_pb2.TASK_PHASE_ACCEPTED)
        await leaving.leave()
        another = await running.device("another")
        waiting = asyncio.create_task(another.task())
        await running.until_polling("another")
        await staying.push(task)
        tasks = await asyncio.gather(staying.task(), waiting)
        assert [given.round for given in tasks] == [2, 2]
        states = {it.worker: it.state for it in (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers}
        assert states["leaving"] == pb.WORKER_STATE_AWAY


async def test_a_task_that_its_worker_has_not_begun_goes_to_another_at_once(tmp_path):
    async with running_aggregator(tmp_path, policy={**ALONE, "min_workers": 2}) as running:
        staying, leaving = await running.device("staying"), await running.device("leaving")
        await asyncio.gather(staying.task(), leaving.task())
        for _ in range(2):
            await running.stub.Leave(pb.LeaveRequest(worker="leaving"))
        record = await running.until_task("leaving", round_pb2.TASK_PHASE_FAILED)
        assert record.reason == "its worker has left"
        assert (await (await running.device("another")).task()).round == 1


async def test_a_worker_that_leaves_while_tasks_are_being_stored_keeps_none(tmp_path):
    async with running_aggregator(tmp_path, policy={**ALONE, "min_workers": 2}) as running:
        devices = [await running.device(name) for name in ("staying", "leaving")]
        coordinator, go_on = running.aggregator.coordinator, threading.Event()
        storing = asyncio.create_task(coordinator.in_database(go_on.wait))
        polling = [asyncio.create_task(device.poll()) for device in devices]
        try:
            async with asyncio.timeout(60):
                # Both are chosen, and their tasks wait for the database.
                while coordinator.fleet.reserved != {"staying", "leaving"}:
                    await running.run()
                await running.stub.Leave(pb.LeaveRequest(worker="leaving"))
        finally:
            go_on.set()
        assert (await polling[0]).HasField("task")
        record = await running.until_task("leaving", round_pb2.TASK_PHASE_FAILED)
        assert record.reason == "its worker has left"
        assert (await (await running.device("another")).task()).round == 1
        polling[1].cancel()
        await storing


async def test_a_task_that_its_worker_has_begun_stays_its_own_when_it_leaves(tmp_path):
    async with running_aggregator(tmp_path, policy={**ALONE, "min_workers": 2}) as running:
        staying, leaving = await running.device("staying"), await running.device("leaving")
        task, kept = await asyncio.gather(staying.task(), leaving.task())
        await leaving.beat(kept)
        await running.stub.Leave(pb.LeaveRequest(worker="leaving"))
        assert (await leaving.push(kept)).complete
        assert (await staying.push(task)).complete
        await running.until_finished()


async def test_a_run_ends_without_the_scores_of_an_evaluator_that_has_left(tmp_path):
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        trainer, scorer = (
            await running.device("trainer"),
            Leaving(running, tmp_path, "scorer", WorkerRole.EVALUATOR),
        )
        await running.until_known("scorer")
        task = await trainer.task()
        await scorer.leave()
        await trainer.push(task)
        await running.until_finished()


async def test_a_run_ends_without_the_scores_of_a_leaf_whose_last_evaluator_has_left(tmp_path):
    async with (
        running_aggregator(tmp_path, policy=ALONE) as root,
        running_leaf(tmp_path / "leaf", "leaf", root, policy=ALONE) as leaf,
    ):
        scorer = Leaving(leaf, tmp_path, "scorer", WorkerRole.EVALUATOR)
        await root.until_known("leaf.evaluators")
        trainer = await leaf.device("trainer")
        task = await trainer.task()
        await scorer.leave()
        await trainer.push(task)
        await root.until_finished()
        assert (await trainer.poll()).run_ended
        assert await leaf.task == 0

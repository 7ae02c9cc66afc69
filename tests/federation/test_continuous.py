"""A run without a last round, with real workers: it trains when devices have new data, and rests in between."""

import asyncio

from fedgrpc.trainer import LocalExamples
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker


class Gathering(ShiftTrainer):
    """Its device gathers examples, one file after another."""

    def gather(self, count):
        self.examples += count

    def local_examples(self):
        return LocalExamples(self.examples, ("files", self.examples))


async def test_a_round_opens_when_enough_devices_have_new_examples(tmp_path):
    trainers = {name: Gathering(1.0, examples=0) for name in "abc"}
    async with running_aggregator(tmp_path, rounds=None, policy={"min_workers": 2}, poll_wait_s=0.2) as running:
        workers = [start_worker(running, tmp_path, name, trainer) for name, trainer in trainers.items()]

        async def until_told(**counts):
            async with asyncio.timeout(PATIENCE_S):
                while running.aggregator.coordinator.machine.new_examples != counts:
                    await running.run()

        await until_told(a=0, b=0, c=0)
        trainers["a"].gather(15)
        await until_told(a=15, b=0, c=0)
        listed = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert {each.worker: each.new_examples for each in listed} == {"a": 15, "b": 0, "c": 0}
        assert not (await running.round(1)).tasks

        trainers["b"].gather(5)
        committed = await running.until_ended(1)
        assert {task.worker: task.example_count for task in committed.tasks} == {"a": 15, "b": 5}
        await until_told(a=0, b=0, c=0)

        # Of a device that had a round already, what it has gathered since is new.
        trainers["a"].gather(1)
        trainers["c"].gather(4)
        committed = await running.until_ended(2)
        assert {task.worker: task.example_count for task in committed.tasks} == {"a": 16, "c": 4}
        run = await running.run()
        assert (run.phase, run.total_rounds) == (pb.RUN_PHASE_RUNNING, 0)

        await running.stub.StopRun(pb.StopRunRequest())
        assert await asyncio.gather(*workers) == [0, 0, 0]

"""Work that time bounds, and the mean of updates that took unequal numbers of steps."""

import asyncio
import time

import numpy as np
import pytest

from fedgrpc.aggregation.scaling import accumulated_steps
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError
from fedgrpc.trainer import TrainResult
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2
from tests.support.hand_driven_device import MODEL, chunks, encoded, refused, update_of
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

ACCEPTED = round_pb2.TASK_PHASE_ACCEPTED
LEADING = device_pb2.WORKER_ROLE_AGGREGATOR


class Plodder(ShiftTrainer):
    """Takes a hundredth of a second a step, and would take ten thousand of them."""

    def train(self, weights, job):
        steps = 0
        for _ in job.batches(10_000, 1):
            time.sleep(0.01)
            steps += 1
        done = super().train(weights, job)
        return TrainResult(done.weights, self.examples, steps, done.metrics)


async def fleet(running, *names):
    devices = [await running.device(name) for name in names]
    return devices, await asyncio.gather(*(device.task() for device in devices))


def tasks_of(round_):
    return {task.worker: task for task in round_.tasks}


async def test_a_worker_trains_until_its_upload_needs_the_time_and_tells_its_steps(tmp_path):
    """The whole work would take 100 s, of the 600 s all but 2 are kept for the upload."""
    plan = TrainingPlan(upload_reserve_s=598.0)
    policy = {"min_workers": 1}
    async with running_aggregator(tmp_path, policy=policy, plan=plan) as running:
        worker = start_worker(running, tmp_path, "plodder", Plodder())
        await running.until_finished()
        task = tasks_of(await running.round())["plodder"]
        assert task.phase == ACCEPTED
        assert 1 <= task.steps < 1000
    assert await worker == 0


async def test_without_a_reserve_all_of_the_work_is_done(tmp_path):
    async with running_aggregator(tmp_path) as running:
        device, other = await running.device("a"), await running.device("b")
        task, _ = await asyncio.gather(device.task(), other.task())
        assert not task.plan.HasField("upload_reserve")


async def test_a_worker_whose_uploads_have_taken_long_is_told_to_leave_more_time(tmp_path):
    plan = TrainingPlan(upload_reserve_s=0.5)
    async with running_aggregator(tmp_path, plan=plan, rounds=2) as running:
        (slow, quick), tasks = await fleet(running, "slow", "quick")
        assert [task.plan.upload_reserve.ToTimedelta().total_seconds() for task in tasks] == [0.5, 0.5]
        manifest, payload = encoded(update_of())
        header = pb.PushUpdateRequest(header=slow.header(tasks[0], manifest))
        call = slow.stub.PushUpdate()
        await call.write(header)
        first, *rest = chunks(payload)
        await call.write(first)
        await slow.until_held(tasks[0], len(first.chunk.data))
        await asyncio.sleep(1.0)
        for message in rest:
            await call.write(message)
        await call.done_writing()
        assert (await call).complete
        await quick.push(tasks[1])
        slow_task, _ = await asyncio.gather(slow.task(), quick.task())
        assert 1.2 <= slow_task.plan.upload_reserve.ToTimedelta().total_seconds() < 120


async def test_updates_of_unequal_steps_count_by_their_direction(tmp_path):
    """FedNova: each is brought to the mean number of steps, tau_eff = 2; what is no difference stays as it is."""
    async with running_aggregator(tmp_path, plan=TrainingPlan(epochs=1.0, algorithm="fednova")) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        await a.push(tasks[0], update_of(1.0, n=5), steps=1)
        await b.push(tasks[1], update_of(3.0, n=5), steps=3)
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 2.0, rtol=1e-6)
        assert running.weights(2)["n"] == 5
        seen = tasks_of(await running.round())
        assert [seen[name].scale for name in "ab"] == pytest.approx([2.0, 2 / 3])
        assert [seen[name].steps for name in "ab"] == [1, 3]


async def test_without_normalization_updates_count_as_they_are(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        await asyncio.gather(a.push(tasks[0], steps=1), b.push(tasks[1], update_of(3.0), steps=3))
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 2.0, rtol=1e-6)
        assert {task.scale for task in (await running.round()).tasks} == {1.0}


async def test_steps_with_momentum_amount_to_more(tmp_path):
    plan = TrainingPlan(momentum=0.9, algorithm="fednova")
    async with running_aggregator(tmp_path, plan=plan) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        await asyncio.gather(a.push(tasks[0], steps=1), b.push(tasks[1], steps=10))
        await running.until_finished()
        seen = tasks_of(await running.round())
        ratio = accumulated_steps(10, 0.9) / accumulated_steps(1, 0.9)
        assert seen["a"].scale / seen["b"].scale == pytest.approx(ratio)
        assert ratio > 10


@pytest.mark.parametrize(("steps", "plan"), [(0, {}), (11, {}), (21, {"epochs": 2.0}), (4, {"max_steps": 3})])
async def test_steps_that_cannot_be_are_refused_where_others_depend_on_them(tmp_path, steps, plan):
    async with running_aggregator(tmp_path, plan=TrainingPlan(algorithm="fednova", **plan)) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        with refused("INVALID_ARGUMENT", f"{steps} steps are reported", "UpdateRefused"):
            await a.push(tasks[0], update_of(100.0), steps=steps)
        await b.push(tasks[1], steps=1)
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1.0, rtol=1e-6)


@pytest.mark.parametrize("accumulated", [0.0, 0.99, 20.1, float("nan"), float("inf")])
async def test_a_mean_that_tells_of_steps_that_cannot_be_is_refused_too(tmp_path, accumulated):
    """Of 20 examples, each batch of one: 20 steps at most, whoever of its workers took them."""
    async with running_aggregator(tmp_path, plan=TrainingPlan(algorithm="fednova")) as running:
        leaf, other = await running.device("leaf", role=LEADING), await running.device("other")
        tasks = await asyncio.gather(leaf.task(), other.task())
        assert tasks[0].plan.algorithm == "fednova"
        mean = {"example_count": 20, "steps": 20, "merged_updates": 2, "weight": 20.0}
        with refused("INVALID_ARGUMENT", "accumulated steps are reported", "UpdateRefused"):
            await leaf.push(tasks[0], accumulated_steps=accumulated, **mean)
        await other.push(tasks[1])
        await running.until_finished()


async def test_a_mean_counts_by_what_the_steps_in_it_amount_to(tmp_path):
    async with running_aggregator(tmp_path, plan=TrainingPlan(algorithm="fednova")) as running:
        leaf, other = await running.device("leaf", role=LEADING), await running.device("other")
        tasks = await asyncio.gather(leaf.task(), other.task())
        mean = {"example_count": 30, "steps": 8, "merged_updates": 2, "weight": 30.0}
        await leaf.push(tasks[0], update_of(4.0), accumulated_steps=4.0, **mean)
        await other.push(tasks[1], update_of(2.0), steps=2)
        await running.until_finished()
        # tau_eff = (30 * 4 + 10 * 2) / 40, and every step was one of 1.
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 3.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"momentum": 0.9, "algorithm": "fednova:mu=0.1", "learning_rate": 0.1}, "both momentum and mu"),
        ({"algorithm": "fednova:mu=0.1"}, "needs a learning_rate"),
        ({"algorithm": "fednova:mu=10", "learning_rate": 0.1}, "needs a learning_rate"),
    ],
)
def test_steps_of_which_nobody_knows_what_they_amount_to_are_not_normalized(tmp_path, plan, reason):
    with pytest.raises(UsageError, match=reason):
        AggregatorSettings(tmp_path, plan=TrainingPlan(**plan))

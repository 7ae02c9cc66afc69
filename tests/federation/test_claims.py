"""What one worker claims stops no process, now or after a restart, and spoils nobody else's round."""

import asyncio

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import device_pb2, round_pb2
from tests.support.hand_driven_device import MODEL, HandDrivenDevice, refused, update_of
from tests.support.running_federation import running_aggregator
from tests.support.running_hierarchy import running_leaf

REJECTED, ACCEPTED = round_pb2.TASK_PHASE_REJECTED, round_pb2.TASK_PHASE_ACCEPTED
MOST = 2**64 - 1


async def both(running, names=("honest", "evil")):
    devices = [await running.device(name) for name in names]
    return devices, await asyncio.gather(*(device.task() for device in devices))


def tasks_of(round_):
    return {task.worker: task for task in round_.tasks}


async def test_memory_beyond_all_measure_is_counted_as_the_most_there_is_and_the_next_round_opens(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, policy={"min_workers": 1}) as running:
        evil = await running.device("evil")
        await evil.push(await evil.task(), peak_memory_bytes=MOST, tensor_bytes=MOST)
        await evil.task()
        assert tasks_of(await running.round(1))["evil"].peak_memory_bytes < 2**53
    async with running_aggregator(tmp_path, rounds=3, policy={"min_workers": 1}) as running:
        await (evil := HandDrivenDevice(running.stub, "evil")).register()
        task = await evil.task()
        await evil.push(task)
        assert (await running.until_ended(2)).phase == round_pb2.ROUND_PHASE_COMMITTED


async def test_a_record_of_memory_beyond_all_measure_is_read_within_bounds(tmp_path):
    """A data folder of a version that let it pass."""
    async with running_aggregator(tmp_path, rounds=3, policy={"min_workers": 1}) as running:
        evil = await running.device("evil")
        await evil.push(await evil.task())
        record = await running.until_ended(1)
        record.tasks[0].peak_memory_bytes = record.tasks[0].tensor_bytes = MOST
        record.tasks[0].timings.local_seconds = 5e-324
        record.tasks[0].timings.upload_seconds = 1.7e308
        store = running.aggregator.coordinator.store
        sql = "UPDATE rounds SET record = ? WHERE number = 1"
        call = running.aggregator.coordinator.in_database
        await call(lambda: store._db.execute(sql, (record.SerializeToString(),)))
    async with running_aggregator(tmp_path, rounds=3, policy={"min_workers": 1}) as running:
        evil = HandDrivenDevice(running.stub, "evil")
        await evil.register()
        await evil.push(await evil.task())
        assert (await running.until_ended(2)).phase == round_pb2.ROUND_PHASE_COMMITTED


@pytest.mark.parametrize(
    "claim",
    [
        {"steps": MOST},
        {"evaluation_example_count": MOST},
        {"example_count": 2**41},
        {"metrics": {"train_loss": 1.7e308}},
        {"metrics": {"a\nb": 1.0}},
        {"evaluation_metrics": {"accuracy": -1e31}},
    ],
)
async def test_a_number_that_decides_is_refused_out_of_its_range(tmp_path, claim):
    async with running_aggregator(tmp_path) as running:
        (honest, evil), tasks = await both(running)
        with refused("INVALID_ARGUMENT", ""):
            await evil.push(tasks[1], **claim)
        await honest.push(tasks[0], update_of(2.0))
        await running.until_finished()
        assert tasks_of(await running.round(1))["evil"].phase == REJECTED
        np.testing.assert_allclose((await honest.model())["b"], MODEL["b"] + 2.0)


async def test_the_largest_claims_that_pass_add_up_in_a_leaf(tmp_path):
    most = 1 << 40
    async with (
        running_aggregator(tmp_path, rounds=1, policy={"min_workers": 1}) as root,
        running_leaf(tmp_path / "leaf", "leaf", root) as leaf,
    ):
        devices, tasks = await both(leaf)
        largest = {"example_count": most, "steps": most, "evaluation_example_count": most}
        for device, task in zip(devices, tasks, strict=True):
            await device.push(task, evaluation_metrics={"accuracy": 0.5}, **largest)
        await root.until_finished()
        task = tasks_of(await root.round(1))["leaf"]
        assert task.phase == ACCEPTED
        assert task.merged_updates == 2
        assert task.example_count == task.steps == most


async def test_an_update_that_makes_the_model_not_finite_is_left_out_by_name_and_the_others_count(tmp_path):
    async with running_aggregator(tmp_path, server_learning_rate=1e23) as running:
        (honest, evil), tasks = await both(running)
        await evil.push(tasks[1], update_of(1e16))
        await honest.push(tasks[0], update_of(1e-23))
        assert (await running.until_finished()).model_version == 2
        found = tasks_of(await running.round(1))
        assert found["evil"].phase == REJECTED
        assert "not be finite" in found["evil"].reason
        assert found["honest"].phase == ACCEPTED
        np.testing.assert_allclose((await honest.model())["b"], MODEL["b"] + 1.0, rtol=1e-6)


async def test_a_leaf_leaves_out_an_update_whose_mean_is_not_finite_too(tmp_path):
    """Ten times 60,000, as the update of one step counts here, is more than float16 holds."""
    half = {name: values.astype(np.float16) for name, values in MODEL.items() if name != "n"}
    change = {name: np.ones_like(values) for name, values in half.items()}
    save_file(half, tmp_path / "initial.safetensors")
    async with (
        running_aggregator(
            tmp_path, rounds=1, policy={"min_workers": 1}, plan=TrainingPlan(algorithm="fednova")
        ) as root,
        running_leaf(tmp_path / "leaf", "leaf", root) as leaf,
    ):
        (honest, evil), tasks = await both(leaf)
        await evil.push(tasks[1], {name: values * np.float16(60000) for name, values in change.items()}, steps=1)
        await honest.push(tasks[0], change, steps=20, example_count=20)
        await root.until_finished()
        assert tasks_of(await root.round(1))["leaf"].merged_updates == 1
        assert (await honest.model())["b"].max() <= 1.0


async def test_losses_of_all_sizes_leave_the_choice_of_workers_working(tmp_path):
    choosing = SelectionPolicy(selection="oort")
    async with running_aggregator(tmp_path, rounds=4, choosing=choosing) as running:
        (honest, evil), tasks = await both(running)
        for _ in range(3):
            await evil.push(tasks[1], example_count=1 << 40, metrics={"train_loss": 1e30})
            await honest.push(tasks[0], metrics={"train_loss": 1.0})
            tasks = await asyncio.gather(honest.task(), evil.task())


async def test_a_device_is_known_by_short_printable_words(tmp_path):
    about = {
        "device_class": "pi\x1b]0;PWNED\x07\x1b[2J\n4 " + "x" * 5000,
        "cpu_model": "\u202eevil",
        "memory_bytes": MOST,
        "uplink_bits_per_second": MOST,
    }
    async with running_aggregator(tmp_path) as running:
        await running.device("evil", device=device_pb2.DeviceProfile(**about))
        device = running.aggregator.coordinator.fleet.get("evil").registration.device
        assert device.device_class.isprintable()
        assert device.device_class.startswith("pi ]0;PWNED")
        assert len(device.device_class) <= 128
        assert device.cpu_model == "evil"
        assert device.memory_bytes < 2**53


async def test_the_reason_of_a_task_given_back_is_one_short_printable_line(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (_, evil), tasks = await both(running)
        await evil.give_back(tasks[1], "boom [/nope] \x1b[2J\r\n" + "x" * 5000)
        reason = (await running.until_task("evil", round_pb2.TASK_PHASE_FAILED)).reason
        assert reason.startswith("boom [/nope] [2J x")
        assert reason.isprintable()
        assert len(reason) <= 500


async def test_a_claim_of_steps_scales_the_updates_of_others_by_no_more_than_its_own_say(tmp_path):
    weights = {"honest": 1.0, "evil": 0.001}
    async with running_aggregator(
        tmp_path, worker_weights=weights, plan=TrainingPlan(algorithm="fednova")
    ) as running:
        (honest, evil), tasks = await both(running)
        await evil.push(tasks[1], update_of(0.0), example_count=1 << 40, steps=1 << 40)
        await honest.push(tasks[0], update_of(1.0), steps=10)
        await running.until_finished()
        np.testing.assert_allclose((await honest.model())["b"], MODEL["b"] + 1.0, rtol=0.06)

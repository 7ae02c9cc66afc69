"""What plans cost is learned from every committed round, and known again after a restart; operators see it."""

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack

import pytest
from safetensors.numpy import save_file

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2
from fedgrpc.v1.round_pb2 import ROUND_PHASE_COMMITTED, TASK_KIND_TRAIN
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.learning_tasks import Sliced
from tests.support.processes import ROOT, aggregator_process, free_address, reconnected, worker_process

TIMINGS = {
    1: device_pb2.Timings(download_seconds=1, local_seconds=8, upload_seconds=2),
    2: device_pb2.Timings(download_seconds=3, local_seconds=4, upload_seconds=6),
    3: device_pb2.Timings(download_seconds=2, local_seconds=6, upload_seconds=4),
}


async def play(running, device, count):
    """The device's tasks of that many rounds, each accepted and its round over; the last round's record."""
    for _ in range(count):
        task = await device.task()
        cost = {"timings": TIMINGS[task.round], "peak_memory_bytes": 600 << 20}
        await device.push(task, **cost)
        record = await running.until_ended(task.round)
    return record


async def test_what_a_device_has_cost_is_known_to_an_aggregator_that_was_killed(tmp_path):
    address = free_address()
    arguments = ("--rounds", 5, "--min-workers", 1)
    async with aggregator_process(tmp_path, *arguments, address=address) as (aggregator, running):
        device = await running.device("pi")
        record = await play(running, device, 3)
        # Predicted from two tasks, and nothing at all was known before the first.
        assert record.tasks[0].prediction.local_seconds == pytest.approx(6)
        assert not (await running.round(1)).tasks[0].prediction.HasField("local_seconds")
        assert await aggregator.kill() == -9
    async with aggregator_process(tmp_path, *arguments, address=address) as (_, running):
        (device,) = reconnected(running, device)
        task = await device.task()
        expected = (await running.round()).tasks[0].prediction
        assert task.round == 4
        assert expected.local_seconds == pytest.approx(6)
        assert expected.peak_memory_bytes == pytest.approx(600 << 20, rel=0.01)


PLANS = """
[[automatic]]
[[automatic]]
width = 0.5
[[automatic]]
width = 0.125

[tiny]
width = 0.25

[keeper]
personal_layers = ["b"]
"""
# A link so slow that by its word half the model is all that fits the two minutes of a round.
DEVICES = {
    "pi": ("--profile", "uplink_bits_per_second=20"),
    "watch": ("--device-class", "tiny"),
    "home": ("--device-class", "keeper"),
}


async def fedgrpc(*arguments):
    """What the command prints."""
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedgrpc", *map(str, arguments)),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await command.communicate()
    assert command.returncode == 0
    return out.decode()


def slices(record):
    return {task.worker: task.local_model.sub_model for task in record.tasks}


async def until_trained(running, version):
    """The committed rounds of training, of which one has made that version or a later one."""
    await running.until(lambda run, _: run.model_version >= version, timeout_s=5 * PATIENCE_S)
    rounds = await running.rounds()
    return [it for it in rounds if it.kind == TASK_KIND_TRAIN and it.phase == ROUND_PHASE_COMMITTED]


@pytest.mark.faults
async def test_plans_by_class_and_layers_at_home_hold_over_a_kill_and_operators_see_what_they_cost(tmp_path):
    address = free_address()
    (tmp_path / "plans.toml").write_text(PLANS)
    save_file(Sliced(tmp_path).initial_weights(), tmp_path / "initial.safetensors")
    # What stays at home is told from what comes by the size of its steps.
    (tmp_path / "home-data").mkdir()
    (tmp_path / "home-data" / "change").write_text("1000")
    arguments = ("--rounds", 200, "--min-workers", 3, "--quorum", 3, "--local-models", tmp_path / "plans.toml")
    asked = ("--aggregator", address)
    task = ("--task", "tests.support.learning_tasks:Sliced", "--data", tmp_path)

    async with AsyncExitStack() as stack:

        async def work(name):
            worker = worker_process(
                running, tmp_path, name, tmp_path / f"{name}-data", *DEVICES[name], task="Sliced"
            )
            return await stack.enter_async_context(worker)

        async with aggregator_process(tmp_path, *arguments, address=address) as (aggregator, running):
            workers = {name: await work(name) for name in DEVICES}
            rounds = await until_trained(running, 4)
            told = slices(rounds[1])
            assert (told["watch"], told["home"]) == ("prefix:0.25", "")
            plans = {each["device"]: each for each in json.loads(await fedgrpc("plan", *task, *asked, "--json"))}
            await running.stub.PauseRun(pb.PauseRunRequest())
            assert await workers["home"].kill() == -9
            assert await aggregator.kill() == -9
        before = Sliced.given(tmp_path / "home-data")

        async with aggregator_process(tmp_path, *arguments, address=address) as (_, running):
            version = (await running.run()).model_version
            await work("home")
            await running.stub.ResumeRun(pb.ResumeRunRequest())
            rounds = await until_trained(running, version + 2)
            shown = await fedgrpc("status", *asked, "--plans")

    assert slices(rounds[-1])["watch"] == "prefix:0.25"
    # Each training of the layer at home went on from the one before it.
    after = Sliced.given(tmp_path / "home-data")
    assert len(after) > len(before)
    assert after == sorted(after)
    assert after[len(before)] >= before[-1] >= 1000

    assert (plans["watch"]["chosen"], plans["watch"]["reason"]) == ("width = 0.25\n", "the plan of tiny")
    assert plans["home"]["reason"] == "the plan of keeper"
    assert plans["pi"]["measured_tasks"] >= 3
    assert "width = 0.25" in shown
    assert "personal_layers" in shown
    measured = [line for line in shown.splitlines() if line.startswith(("pi ", "watch ", "home ")) and "→" in line]
    assert len(measured) == 3

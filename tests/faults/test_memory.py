"""Promise 6: "Memory is O(own sub-model) on a device." A worker with a quarter of the width never holds the whole
model: not when it is built, nor in its first round, nor when it scores the last version.
"""

import asyncio
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import round_pb2
from tests.faults.large_model import LargeModel
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.processes import ROOT, running_process
from tests.support.running_federation import running_aggregator

pytestmark = pytest.mark.faults

# What a process takes that has trained a small model.
SMALL = """
from fedgrpc.process import peak_memory_bytes
from fedgrpc.worker.task_loader import load_trainer
from fedgrpc.trainer import TrainJob
import fedgrpc.cli.worker, fedgrpc.worker.process
trainer = load_trainer("fedgrpc.tasks.digits")
trainer.train(trainer.initial_weights(), TrainJob(max_steps=2))
print(peak_memory_bytes())
"""


@pytest.fixture(scope="module")
def process_bytes():
    return int(subprocess.check_output([sys.executable, "-c", SMALL], cwd=ROOT, text=True))


async def test_a_narrow_worker_takes_less_than_the_whole_model_beside_its_process(tmp_path, process_bytes):
    rng = np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in LargeModel().model().state_dict().items()}
    model = {name: rng.standard_normal(shape, np.float32) / 64 for name, shape in shapes.items()}
    whole_bytes = sum(array.nbytes for array in model.values())
    assert whole_bytes > 135_000_000
    save_file(model, tmp_path / "initial.safetensors")
    del model
    how = {"download_recipe": "int8+zstd", "upload_recipe": "int8+zstd", "evaluate": True, "rounds": 2}
    plans = PlanTable(LocalModelPlan(0.25))
    async with running_aggregator(tmp_path, policy={"min_workers": 1}, local_models=plans, **how) as running:
        place = ["--aggregator", running.address, "--serve-address", "none", "--name", "pi"]
        task = ["--task", "tests.faults.large_model:LargeModel", "--state-dir", tmp_path / "pi"]
        async with running_process("worker", *place, *task):
            await running.until_finished()
            rounds = await running.rounds()
    tasks = [task for each in rounds for task in each.tasks]
    assert [each.kind for each in rounds] == [*[round_pb2.TASK_KIND_TRAIN] * 2, round_pb2.TASK_KIND_EVALUATE]
    assert {task.local_model.sub_model for task in tasks} == {"prefix:0.25"}
    assert tasks[-1].evaluation_metrics["accuracy"] >= 0
    most = max(task.peak_memory_bytes for task in tasks)
    assert most - process_bytes < whole_bytes
    for task in tasks[:2]:
        assert abs(task.prediction.peak_memory_bytes / task.peak_memory_bytes - 1) < 0.2


async def test_a_device_whose_training_was_killed_gets_a_smaller_plan(tmp_path):
    plans = PlanTable(automatic=(LocalModelPlan(), LocalModelPlan(0.75), LocalModelPlan(0.5)))
    async with running_aggregator(
        tmp_path, policy={"min_workers": 1}, local_models=plans, initial_model=None, rounds=2
    ) as running:
        place = ["--aggregator", running.address, "--serve-address", "none", "--name", "pi"]
        task = ["--task", "tests.faults.greedy:Greedy", "--state-dir", tmp_path / "pi"]
        lives = 0
        async with asyncio.timeout(PATIENCE_S):
            while lives < 9:
                lives += 1
                async with running_process("worker", *place, *task) as process:
                    if await process.ended() == 0:
                        break
        trained = [each for each in await running.rounds() if each.kind == round_pb2.TASK_KIND_TRAIN]
    tasks = [task for each in trained for task in each.tasks if task.phase == round_pb2.TASK_PHASE_ACCEPTED]
    assert {task.local_model.sub_model for task in tasks} == {"prefix:0.5"}
    assert "killed" in tasks[0].prediction.reason

"""A simulated run is the deployed one: the same versions, bit for bit, and the same participation."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.simulation.fleet import DeviceKind
from fedgrpc.simulation.learning.engine import InProcess
from fedgrpc.simulation.learning.experiment import Experiment, Learning
from fedgrpc.simulation.learning.run import LearningRun
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1.round_pb2 import TaskPhase
from fedgrpc.worker.task_loader import load_trainer
from tests.support.running_federation import running_aggregator, settings_for, start_worker

DEVICES = 5
ROUNDS = 3
LEARNING = Learning("fedgrpc.tasks.digits", partition="dirichlet:0.5")
POLICY = {"min_workers": DEVICES}
MORE = {
    "rounds": ROUNDS,
    "initial_model": None,
    # The first model travels encoded, and its rounding follows from the name of the device that gives it.
    "initialisers": ("pi-0",),
    "evaluate": True,
    "keep_versions": 2 * ROUNDS,
    "plan": TrainingPlan(epochs=2.0),
    "run_name": "truth",
    "seed": 7,
}


def _settings(folder: Path, recipe: str, difference: str | None):
    recipes = {"upload_recipe": recipe, "download_recipe": recipe, "difference_recipe": difference}
    return settings_for(folder, POLICY, **MORE, **recipes)


def _versions(folder: Path) -> dict[int, str]:
    return {
        int(path.stem): ModelFile.open(path).sha256().hex() for path in sorted((folder / "models").glob("*.saf*"))
    }


async def _deployed(folder: Path, recipe: str, difference: str | None):
    """The versions, and who took part in each round, of real workers over gRPC."""
    recipes = {"upload_recipe": recipe, "download_recipe": recipe, "difference_recipe": difference}
    async with running_aggregator(folder, policy=POLICY, **MORE, **recipes) as running:
        workers = []
        for index in range(DEVICES):
            part = f"{index + 1}/{DEVICES}"
            trainer = load_trainer(LEARNING.task, device="cpu", partition=LEARNING.partition, part=part, threads=1)
            workers.append(start_worker(running, folder, f"pi-{index}", trainer, device={"memory_bytes": 1 << 33}))
        everything = load_trainer(LEARNING.task, device="cpu", threads=1)
        workers.append(start_worker(running, folder, "evaluator", everything, role=WorkerRole.EVALUATOR))
        await asyncio.gather(*workers)
        rounds = await running.rounds()
        accepted = {
            record.number: sorted(
                task.worker for task in record.tasks if task.phase == TaskPhase.TASK_PHASE_ACCEPTED
            )
            for record in rounds
        }
        scores = {r.committed_version: dict(r.evaluator_metrics) for r in rounds if r.evaluator_metrics}
    return _versions(running.settings.data_dir), accepted, scores


def _simulated(folder: Path, recipe: str, difference: str | None):
    kinds = (DeviceKind("pi", DEVICES, up_mbit=8.0, down_mbit=20.0, examples_per_s=300.0, memory_mb=8192),)
    experiment = Experiment(kinds, LEARNING, _settings(folder, recipe, difference))
    history = LearningRun(experiment, folder / "simulated", InProcess(LEARNING, DEVICES)).run()
    accepted = {row.round: sorted(row.workers) for row in history.rows}
    return _versions(folder / "simulated" / "run"), accepted, history.scores()


@pytest.mark.parametrize(
    ("recipe", "difference"),
    [("raw", None), ("int8+zstd", None), pytest.param("int8+zstd", "entropy:c=1+zstd", marks=pytest.mark.faults)],
)
async def test_simulated_versions_are_those_of_real_workers_over_grpc(
    tmp_path: Path, recipe: str, difference: str | None
) -> None:
    versions, accepted, scores = await _deployed(tmp_path, recipe, difference)
    # In a thread: the simulation runs an event loop of its own.
    simulated = await asyncio.to_thread(_simulated, tmp_path, recipe, difference)
    assert simulated[0] == versions
    assert len(versions) == ROUNDS + 1
    assert simulated[1] == accepted
    assert simulated[2] == scores

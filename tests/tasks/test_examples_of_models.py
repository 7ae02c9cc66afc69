"""The examples for Transformers, PEFT, Lightning, scikit-learn, XGBoost and JAX; most by `make test-models`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.trainer import TrainJob
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.task_loader import load_trainer
from tests.federation.test_local_models import Worker, play
from tests.tasks.test_ready_made import accuracy, averaged_rounds

ROOT = Path(__file__).parents[2]
RAW = {"download_recipe": "raw+zstd", "upload_recipe": "raw+zstd"}
NEEDS = {
    "huggingface_classifier": "transformers",
    "peft_lora": "peft",
    "lightning_module": "lightning",
    "sklearn_mlp": "sklearn",
    "jax_flax": "jax",
}
models = pytest.mark.models


def trainer_of(name: str, monkeypatch: pytest.MonkeyPatch, needed: str, **setup: Any) -> Any:
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}: make test-models")
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return load_trainer(name, **setup)


@models
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_learns_when_two_average(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(name, monkeypatch, NEEDS[name])
    start = trainer.initial_weights()
    kept = {tensor: array.copy() for tensor, array in start.items()}
    trained = averaged_rounds([trainer, trainer], rounds=2, epochs=4)
    assert accuracy(trainer, trained) > 0.8 > accuracy(trainer, kept)


@pytest.mark.parametrize("name", [*NEEDS, "sklearn_forest", "xgboost_bagging"])
def test_an_example_is_60_lines_at_most(name: str) -> None:
    lines = (ROOT / "examples" / f"{name}.py").read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 60


async def grown(folder: Path, name: str, trainers: Sequence[Any], rounds: int) -> Any:
    workers: dict[str, Worker] = {f"pi-{number}": ("", each) for number, each in enumerate(trainers)}
    return await play(folder, workers, PlanTable(), rounds=rounds, aggregation=f"{name}:Sum", **RAW)


async def test_a_forest_has_the_trees_of_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        trainer_of("sklearn_forest", monkeypatch, "sklearn", partition="iid", part=f"{part}/3")
        for part in (1, 2, 3)
    ]
    outcome = await grown(tmp_path, "sklearn_forest", parts, 1)
    forest = outcome.versions[-1]
    assert all(np.any(forest["feature"][part]) for part in range(3))
    alone = parts[0].train(parts[0].initial_weights(), TrainJob(seed=1, round=1)).weights
    assert accuracy(parts[0], forest) > accuracy(parts[0], alone) > 0.7


@models
async def test_boosted_trees_build_on_those_of_all_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        trainer_of("xgboost_bagging", monkeypatch, "xgboost", partition="iid", part=f"{part}/2") for part in (1, 2)
    ]
    outcome = await grown(tmp_path, "xgboost_bagging", parts, 4)
    found = [accuracy(parts[0], version) for version in outcome.versions]
    assert found[-1] > 0.9 > found[1] > 0.75
    assert np.any(outcome.versions[-1]["trees"][3, 1])


@models
async def test_adapters_of_peft_have_ranks_that_differ_by_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = [trainer_of("peft_lora", monkeypatch, "peft") for _ in range(2)]
    workers: dict[str, Worker] = {"small": ("small", trainers[0]), "large": ("large", trainers[1])}
    plans = PlanTable(classes={"small": LocalModelPlan(rank=2)})
    recipes = {"download_recipe": "int8+zstd", "upload_recipe": "int8+zstd"}
    outcome = await play(tmp_path, workers, plans, rounds=2, plan=TrainingPlan(epochs=1), **recipes)
    first, last = outcome.versions[0], outcome.versions[-1]
    trained = {name for name in first if not np.array_equal(first[name], last[name])}
    assert trained
    assert all("lora_" in name or "classifier" in name for name in trained)
    frozen_bytes = sum(array.nbytes for name, array in first.items() if name not in trained)
    second = [each for each in outcome.rounds if each.kind == round_pb2.TASK_KIND_TRAIN][1]
    tasks = {task.device_class: task for task in second.tasks}
    assert tasks["small"].upload_bytes < tasks["large"].upload_bytes < 0.1 * frozen_bytes
    assert max(task.download_bytes for task in tasks.values()) < 0.1 * frozen_bytes

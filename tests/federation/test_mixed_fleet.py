"""Devices of every plan train one model in PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedgrpc.submodels.plan import Arithmetic, Clustering, LocalModelPlan, Memory, Pruning, Quantization
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.tasks.digits import Digits
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2
from tests.federation.test_local_models import Worker, play


class Blobs(TorchTask):
    """Four clouds of points; each worker has its own."""

    learning_rate = 0.1
    batch_size = 20

    def __init__(self, cloud: int = 0) -> None:
        self._seed = cloud

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def data(self, path: Path | None) -> tuple[TensorDataset, TensorDataset]:
        generator = torch.Generator().manual_seed(self._seed)
        labels = torch.arange(400) % 4
        points = torch.randn(400, 8, generator=generator) + 3 * torch.eye(4, 8)[labels]
        return TensorDataset(points[:300], labels[:300]), TensorDataset(points[300:], labels[300:])


MIXED = PlanTable(
    LocalModelPlan(),
    {
        "pruned": LocalModelPlan(0.5, pruning=Pruning(0.5)),
        "quantized": LocalModelPlan(0.5, "rolling", quantization=Quantization(8, 8)),
        "clustered": LocalModelPlan(0.5, clustering=Clustering(16), pruning=Pruning(0.3)),
        "bfloat16": LocalModelPlan(0.25, arithmetic=Arithmetic("bfloat16")),
        "fixed": LocalModelPlan(0.5, arithmetic=Arithmetic("fixed16.10", "stochastic")),
        "last layers": LocalModelPlan(
            trained_layers=("4.*",),
            memory=Memory(4, momentum=False),
            arithmetic=Arithmetic("bfloat16", "stochastic"),
        ),
        "everything": LocalModelPlan(
            *(0.5, "random"),
            pruning=Pruning(0.5),
            quantization=Quantization(8, 8),
            clustering=Clustering(16, ("4.*",)),
            arithmetic=Arithmetic("bfloat16"),
        ),
    },
)


@pytest.mark.faults
async def test_a_mixed_fleet_of_torch_workers_learns_one_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    kinds = ["full", *MIXED.classes]
    workers: dict[str, Worker] = {
        f"pi-{number}": (kind, Blobs.build_trainer(TaskSetup(device="cpu", options={"cloud": str(number)})))
        for number, kind in enumerate(kinds)
    }
    outcome = await play(
        tmp_path, workers, MIXED, rounds=5, evaluate=True, plan=TrainingPlan(epochs=2), upload_recipe="int8+zstd"
    )
    scored = [round_.metrics["accuracy"] for round_ in outcome.rounds if "accuracy" in round_.metrics]
    assert scored[-1] > 0.85
    tasks = {task.device_class: task for task in outcome.tasks(-2).values()}
    assert tasks["bfloat16"].download_bytes < 0.15 * tasks["full"].download_bytes
    assert tasks["last layers"].upload_bytes < 0.3 * tasks["full"].upload_bytes
    assert tasks["last layers"].tensor_bytes < 0.3 * tasks["full"].tensor_bytes
    assert tasks["last layers"].metrics["local_accuracy"] > 0.85
    assert tasks["pruned"].metrics["local_accuracy"] > 0.5
    assert tasks["clustered"].upload_bytes < tasks["full"].upload_bytes
    assert tasks["everything"].local_model.sub_model.startswith("random:")
    assert tasks["everything"].upload_bytes < 0.8 * tasks["quantized"].upload_bytes
    assert tasks["everything"].metrics["local_accuracy"] > 0.5


@pytest.mark.faults
async def test_one_device_of_six_whose_format_adds_nothing_does_not_ruin_the_fleet(tmp_path: Path) -> None:
    """Its update weighs what its noise leaves of it, and after three tasks it gets the same plan in float32."""
    coarse = LocalModelPlan(arithmetic=Arithmetic("fixed8.5", "stochastic"))
    workers: dict[str, Worker] = {
        f"w{part}": (
            "coarse" if part == 6 else "",
            Digits.build_trainer(
                TaskSetup(device="cpu", threads=1, partition="dirichlet:0.5", part=f"{part}/6", seed=0)
            ),
        )
        for part in range(1, 7)
    }
    plans = PlanTable(LocalModelPlan(), {"coarse": coarse})
    outcome = await play(tmp_path, workers, plans, rounds=6, plan=TrainingPlan(epochs=3), evaluate=True)
    trained = [each for each in outcome.rounds if each.kind == round_pb2.TASK_KIND_TRAIN]
    tasks = [next(task for task in each.tasks if task.worker == "w6") for each in trained]
    assert [task.local_model.arithmetic.format for task in tasks] == ["fixed8.5"] * 3 + [""] * 3
    for task in tasks[:3]:
        assert task.noise_ratio > 1
        assert task.weight == pytest.approx(task.example_count / (1 + task.noise_ratio))
    assert "fixed8.5 adds nothing" in tasks[3].prediction.reason
    assert all(task.weight == task.example_count for task in tasks[3:])
    scores = [each.metrics["accuracy"] for each in outcome.rounds if "accuracy" in each.metrics]
    assert scores[-1] > 0.85, scores


async def test_pruned_and_clustered_devices_pull_and_push_what_they_keep_alone(tmp_path: Path) -> None:
    plans = PlanTable(
        LocalModelPlan(),
        {"pruned": LocalModelPlan(pruning=Pruning(0.9)), "clustered": LocalModelPlan(clustering=Clustering(4))},
    )
    workers: dict[str, Worker] = {
        name: (name, TorchTrainer(Blobs(cloud), TaskSetup(device="cpu")))
        for cloud, name in enumerate(("", "pruned", "clustered"))
    }
    workers["whole"] = workers.pop("")
    recipes = {"download_recipe": "int8+zstd", "upload_recipe": "int8+zstd"}
    outcome = await play(tmp_path, workers, plans, rounds=3, plan=TrainingPlan(epochs=2), evaluate=True, **recipes)
    trained = [each for each in outcome.rounds if each.kind == round_pb2.TASK_KIND_TRAIN]
    for round_ in trained[-2:]:
        tasks = {task.worker: task for task in round_.tasks}
        assert tasks["pruned"].download_bytes < tasks["whole"].download_bytes / 3
        assert tasks["clustered"].download_bytes < tasks["whole"].download_bytes / 2
        assert tasks["pruned"].upload_bytes < tasks["whole"].upload_bytes / 3
        assert tasks["clustered"].upload_bytes < tasks["whole"].upload_bytes / 2
        assert tasks["pruned"].metrics["local_accuracy"] > 0.6
    # What the reduced ones score is no score of a version.
    scored = [task for each in outcome.rounds for task in each.tasks if task.worker == "whole"]
    whole = {round(task.evaluation_metrics["accuracy"], 9) for task in scored if task.evaluation_metrics}
    versions = {round(each.metrics["accuracy"], 9) for each in outcome.rounds if "accuracy" in each.metrics}
    assert versions <= whole


class Few(Blobs):
    """A model so small that every product and partial sum can be rounded."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.faults
async def test_a_device_that_rounds_every_partial_sum_learns_with_devices_that_do_not(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    plans = PlanTable(
        classes={
            "rounding": LocalModelPlan(arithmetic=Arithmetic("float16", emulated=True, accumulate="format")),
            "half": LocalModelPlan(0.5, arithmetic=Arithmetic("bfloat16", emulated=True, accumulate="format")),
        }
    )
    workers: dict[str, Worker] = {
        f"pi-{cloud}": (kind, TorchTrainer(Few(cloud), TaskSetup(device="cpu")))
        for cloud, kind in enumerate(("", "rounding", "half"))
    }
    outcome = await play(tmp_path, workers, plans, rounds=2, plan=TrainingPlan(epochs=2), evaluate=True)
    scored = [each.metrics["accuracy"] for each in outcome.rounds if "accuracy" in each.metrics]
    assert scored[-1] > 0.8
    tasks = {task.device_class: task for task in outcome.tasks(1).values()}
    for kind in ("rounding", "half"):
        assert tasks[kind].local_model.arithmetic.accumulate_in_format
        # What the format did was measured, and the update weighs a little less for it.
        assert 0 < tasks[kind].noise_ratio < 1
        assert tasks[kind].weight < tasks[""].weight

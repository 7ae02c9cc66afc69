"""Devices of unequal depth and rank in one federation: each trains, holds and sends its own part alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from fedgrpc.aggregator.delta_bases import DeltaBases
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.torch.adapters import with_adapters
from fedgrpc.torch.early_exits import EarlyExits
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, TrainResult, Weights
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2
from tests.federation.test_local_models import Adder, Worker, play
from tests.federation.test_mixed_fleet import Blobs

SHAPES = {"one": (8, 50), "two": (8, 50), "down": (4, 50), "up": (8, 4), "n": ()}
MAP = ChannelMap(
    (ChannelGroup(8), ChannelGroup(4, rank=True)),
    {
        "one": ((Segment(0),), (Segment(None, 50),)),
        "down": ((Segment(1),), (Segment(None, 50),)),
        "up": ((Segment(0),), (Segment(1),)),
    },
    {"one": 1, "two": 2},
)


class BlockAdder(Adder):
    """`Adder` to a model of two blocks and an adapter."""

    def channels(self) -> ChannelMap:
        return MAP

    def initial_weights(self) -> Weights:
        rng = np.random.default_rng(7)
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items() if shape}
        return {**arrays, "n": np.array(0, np.int64)}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        self.given.append({name: array.shape for name, array in weights.items()})
        return TrainResult({name: array + array.dtype.type(self.number) for name, array in weights.items()}, 10, 1)

    def evaluate(self, weights: Weights) -> None:
        return None


async def test_each_coordinate_of_blocks_and_directions_is_averaged_over_those_who_have_it(tmp_path: Path) -> None:
    plans = PlanTable(
        classes={
            "shallow": LocalModelPlan(depth=1),
            "low": LocalModelPlan(rank=1),
            "both": LocalModelPlan(0.5, depth=1, rank=2),
        }
    )
    workers: dict[str, Worker] = {
        name: (name, BlockAdder(number))
        for name, number in {"whole": 1, "shallow": 2, "low": 6, "both": 7}.items()
    }
    outcome = await play(tmp_path, workers, plans, rounds=2)
    before, after = outcome.versions[:2]
    moved = {name: after[name] - before[name] for name in SHAPES}
    np.testing.assert_allclose(moved["one"], np.repeat([4, 3], 4)[:, None] * np.ones((8, 50)), rtol=1e-5)
    np.testing.assert_allclose(moved["two"], 3.5, rtol=1e-5)
    np.testing.assert_allclose(
        moved["down"], np.array([4, 10 / 3, 1.5, 1.5])[:, None] * np.ones((4, 50)), rtol=1e-5
    )
    np.testing.assert_allclose(moved["up"][:4], [[4, 10 / 3, 1.5, 1.5]] * 4, rtol=1e-5)
    np.testing.assert_allclose(moved["up"][4:], [[3, 1.5, 1.5, 1.5]] * 4, rtol=1e-5)
    given = workers["both"][1].given
    assert given == 2 * [{"one": (4, 50), "down": (2, 50), "up": (4, 2), "n": ()}]
    tasks = outcome.tasks(1)
    assert tasks["both"].local_model.sub_model == "prefix:0.5:depth=1:rank=2"
    assert tasks["shallow"].upload_bytes < tasks["low"].upload_bytes < tasks["whole"].upload_bytes


class Rows(Blobs):
    """Clouds of points for a model of three blocks with exits."""

    def model(self) -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(i, 32), nn.ReLU()) for i in (8, 32, 32)]
        return EarlyExits(blocks, [nn.Linear(32, 4) for _ in blocks])


async def test_a_fleet_of_three_depths_learns_one_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    plans = PlanTable(
        LocalModelPlan(distillation=0.5),
        {str(depth): LocalModelPlan(depth=depth, distillation=0.5) for depth in (1, 2)},
    )
    workers: dict[str, Worker] = {
        f"pi-{cloud}": (depth, TorchTrainer(Rows(cloud), TaskSetup(device="cpu")))
        for cloud, depth in enumerate(("1", "1", "2", ""))
    }
    outcome = await play(
        tmp_path, workers, plans, rounds=3, plan=TrainingPlan(epochs=2), evaluate=True, download_recipe="int8+zstd"
    )
    scored = [each.metrics["accuracy"] for each in outcome.rounds if "accuracy" in each.metrics]
    assert scored[-1] > 0.85
    tasks = {task.device_class: task for each in outcome.rounds[:3] for task in each.tasks}
    assert tasks["1"].upload_bytes < 0.6 * tasks["2"].upload_bytes < 0.6 * tasks[""].upload_bytes
    assert tasks["1"].tensor_bytes < 0.6 * tasks["2"].tensor_bytes
    # What a device of depth 1 has on its disk is of the first block alone.
    (path, *_) = (tmp_path / "aggregator" / "delta-bases").glob("*depth=1.safetensors")
    assert all(name.startswith(("blocks.0", "exits.0")) for name in load_file(path))
    # The next process knows it as what it is.
    version, digest, *_ = path.name.split("-")
    assert DeltaBases(path.parent).knows((int(version), bytes.fromhex(digest), "prefix:1.0:depth=1"))


class Adapted(Blobs):
    """Clouds of points for a frozen model with adapters of rank 8; its last layer is trained."""

    def model(self) -> nn.Module:
        return with_adapters(super().model(), 8, ("0", "2"), trained=("4.*",))


async def test_a_fleet_of_three_ranks_learns_and_the_frozen_model_travels_once(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    plans = PlanTable(classes={"1": LocalModelPlan(rank=1), "4": LocalModelPlan(rank=4)})
    workers: dict[str, Worker] = {
        f"pi-{cloud}": (rank, TorchTrainer(Adapted(cloud), TaskSetup(device="cpu")))
        for cloud, rank in enumerate(("1", "4", ""))
    }
    recipes = {"download_recipe": "int8+zstd", "upload_recipe": "int8+zstd"}
    outcome = await play(tmp_path, workers, plans, rounds=3, plan=TrainingPlan(epochs=2), evaluate=True, **recipes)
    first, last = outcome.versions[0], outcome.versions[-1]
    frozen = {name for name in first if ".base." in name}
    assert {name for name in first if np.array_equal(first[name], last[name])} == frozen
    trained = [each for each in outcome.rounds if each.kind == round_pb2.TASK_KIND_TRAIN]
    tasks = [{task.device_class: task for task in each.tasks} for each in trained]
    base_bytes = sum(first[name].nbytes for name in frozen)
    for rank in ("1", "4", ""):
        assert tasks[0][rank].download_bytes > 0.9 * base_bytes
        assert tasks[2][rank].download_bytes < 0.25 * base_bytes
        assert tasks[2][rank].upload_bytes < 0.25 * base_bytes
    assert tasks[2]["1"].upload_bytes < tasks[2]["4"].upload_bytes < tasks[2][""].upload_bytes
    scored = [each.metrics["accuracy"] for each in outcome.rounds if "accuracy" in each.metrics]
    assert scored[-1] > 0.7


class HeadOnly(Blobs):
    """Clouds of points for a model of which the task names what is trained."""

    def trainable(self) -> list[str]:
        return ["4.*"]


async def test_what_trainable_leaves_out_travels_with_the_first_model_alone(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    workers: dict[str, Worker] = {
        f"pi-{cloud}": ("", TorchTrainer(HeadOnly(cloud), TaskSetup(device="cpu"))) for cloud in range(2)
    }
    recipes = {"download_recipe": "int8+zstd", "upload_recipe": "int8+zstd"}
    outcome = await play(tmp_path, workers, PlanTable(), rounds=4, plan=TrainingPlan(epochs=1), **recipes)
    first, last = outcome.versions[0], outcome.versions[-1]
    frozen = {name for name in first if not name.startswith("4.")}
    assert {name for name in first if np.array_equal(first[name], last[name])} == frozen
    frozen_bytes = sum(first[name].nbytes for name in frozen)
    for number, round_ in enumerate(each for each in outcome.rounds if each.kind == round_pb2.TASK_KIND_TRAIN):
        for task in round_.tasks:
            assert task.upload_bytes < 0.1 * frozen_bytes
            assert (task.download_bytes > 0.9 * frozen_bytes) == (number == 0)
            assert number == 0 or task.download_bytes < 0.1 * frozen_bytes

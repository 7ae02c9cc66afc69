"""`fedgrpc check`: what a learning task does here, and what looks like a mistake in it."""

import json
from pathlib import Path

from fedgrpc.cli.small_devices import fitting_board
from tests.support.command_line import NUMPY_TASK, fedgrpc

BROKEN = """
import numpy as np
from fedgrpc.trainer import EvalResult, TrainResult

class Base:
    def initial_weights(self):
        return {"w": np.zeros(30, np.float32)}

    def evaluate(self, weights):
        weights["w"] += 1
        return EvalResult(5, {"accuracy": 0.5})

class Lazy(Base):
    def train(self, weights, job):
        return TrainResult(weights, 10, 3)

class Raising(Base):
    def train(self, weights, job):
        return self.helper(weights)

    def helper(self, weights):
        return weights["nope"]

class Chance(Base):
    def train(self, weights, job):
        return TrainResult({"w": np.random.default_rng().normal(size=30).astype(np.float32)}, 10, 1)
"""


def tried(tmp_path: Path, name: str):
    (tmp_path / "broken.py").write_text(BROKEN)
    return fedgrpc("check", "--task", f"broken:{name}", cwd=tmp_path)


def test_a_task_that_works_is_described_with_what_travels():
    done = fedgrpc("check", "--task", NUMPY_TASK, "--json")
    found = json.loads(done.out)
    assert (done.code, found["remarks"]) == (0, [])
    assert found["model"]["tensors"] == 2
    assert found["one_step"]["peak_memory_bytes"] > 0
    assert "accuracy" in found["evaluation"]["metrics"]
    assert 0 < found["update_sent"]["size_bytes"] < found["model"]["size_bytes"]


def test_the_users_traceback_has_their_lines_and_none_of_fedgrpc(tmp_path):
    done = tried(tmp_path, "Raising")
    assert done.code == 1
    assert done.error.count("broken.py") == 3
    assert 'return weights["nope"]' in done.error
    assert "guarded_trainer" not in done.error
    assert done.error.splitlines()[-1].startswith("error: task broken:Raising raised KeyError")


TORCH = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fedgrpc.torch.task import TorchTask

class Heavy(TorchTask):
    autocast = "bfloat16"

    def model(self):
        return nn.Linear(4, 2).double()

    def prepare(self, inputs, training):
        return inputs.double()

    def data(self, path):
        x = torch.randn(40, 4)
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8, num_workers=1), None
"""


def test_what_would_go_wrong_on_a_small_device_is_told(tmp_path):
    (tmp_path / "heavy.py").write_text(TORCH)
    done = fedgrpc("check", "--task", "heavy", "--threads", "1", "--json", cwd=tmp_path)
    assert done.code == 0, done.error
    found = json.loads(done.out)
    told = " ".join(found["small_devices"])
    assert found["one_step"]["threads"] == 1
    assert all(word in told for word in ("float64", "autocast to bfloat16", "num_workers=1"))


def test_a_board_has_room_for_the_process_beside_its_system():
    boards = [fitting_board(mib << 20) for mib in (100, 312, 313, 1500, 9000)]
    assert boards == [512, 512, 1024, 2048, None]


def test_what_looks_like_a_mistake_is_remarked(tmp_path):
    lazy, chance = tried(tmp_path, "Lazy"), tried(tmp_path, "Chance")
    assert (lazy.code, chance.code) == (0, 0)
    assert "training left every tensor as it was" in lazy.out
    assert "3 were done" in lazy.out
    assert "evaluate changes the weights" in lazy.out
    assert "the same step gives another result" in chance.out

"""`fedgrpc check`: what a learning task does here, and what looks like a mistake in it."""

import json
from pathlib import Path

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


def test_what_looks_like_a_mistake_is_remarked(tmp_path):
    lazy, chance = tried(tmp_path, "Lazy"), tried(tmp_path, "Chance")
    assert (lazy.code, chance.code) == (0, 0)
    assert "training left every tensor as it was" in lazy.out
    assert "3 were done" in lazy.out
    assert "evaluate changes the weights" in lazy.out
    assert "the same step gives another result" in chance.out

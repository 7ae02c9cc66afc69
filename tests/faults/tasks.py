"""Training that gives the same when it is done again, and tells how often it was."""

import time
from pathlib import Path

import numpy as np

from fedgrpc.trainer import EvalResult, TrainResult

# More than one chunk of 1 MiB each way.
MODEL = {
    "w": np.linspace(-1, 1, 400_000, dtype=np.float32).reshape(400, 1000),
    "b": np.zeros(40, np.float32),
    "n": np.array(3, np.int64),
}


def change(seed, number):
    """What one training makes of every float: anything, but always the same."""
    rng = np.random.default_rng((seed, number))
    return {"w": rng.normal(size=(400, 1000)).astype(np.float32), "b": rng.normal(size=40).astype(np.float32)}


class Repeatable:
    """Writes one line into `trained` of its data folder for each training that has ended: the round."""

    def __init__(self, data: Path):
        self.folder = data

    def initial_weights(self):
        return MODEL

    def train(self, weights, job):
        for _ in job.batches(10, 10):
            self.half_way()
        changes = change(job.seed, job.round)
        moved = {name: a + changes[name] if name in changes else a + 1 for name, a in weights.items()}
        with (self.folder / "trained").open("a") as file:
            file.write(f"{job.round}\n")
        return TrainResult({name: a.astype(weights[name].dtype) for name, a in moved.items()}, 10, 1)

    def half_way(self):
        """A point to be killed at; long enough for a heartbeat."""
        time.sleep(0.2)

    def evaluate(self, weights):
        self.scoring()
        return EvalResult(10, {"mean": float(weights["w"].mean())})

    def scoring(self):
        """Another."""

    @staticmethod
    def trained(folder):
        """The rounds of all trainings that ended, in order."""
        path = folder / "trained"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


ZEROS = {"w": np.zeros((50, 40), np.float32), "n": np.array(0, np.int64)}


class Adding:
    """Adds a whole number to every float, so that sums of many rounds are exact; takes `seconds` for it."""

    def __init__(self, change: int = 1, seconds: float = 0.0):
        self.change = change
        self.seconds = seconds

    def initial_weights(self):
        return ZEROS

    def train(self, weights, job):
        for _ in job.batches(10, 10):
            time.sleep(self.seconds)
        return TrainResult({"w": weights["w"] + np.float32(self.change), "n": weights["n"]}, 10, 1)

    def evaluate(self, weights):
        return None


def changes_of(workers):
    """What each of so many workers adds, every sum of some of them another; their mean is a whole number."""
    changes = [1 << i for i in range(workers)]
    return [*changes[:-1], changes[-1] + -sum(changes) % workers]

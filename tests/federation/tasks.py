"""A learning task for workers that are killed: it tells in its data folder what it did, and waits when told.

trained     one line for each training begun
wait        while this file is there, training does not end
"""

import time
from pathlib import Path

import numpy as np

from fedgrpc.worker.trainer import EvalResult, TrainResult


class Recorded:
    """Adds to every float a number that no second training would give again."""

    def __init__(self, data: Path):
        self.folder = data

    def initial_weights(self):
        return {"w": np.zeros(4, np.float32)}

    def train(self, weights, job):
        change = np.float32(int.from_bytes(np.random.default_rng().bytes(2), "little"))
        with (self.folder / "trained").open("a") as file:
            file.write(f"{change}\n")
        for _ in job.batches(10, 10):
            while (self.folder / "wait").exists() and not job.stop():
                time.sleep(0.02)
        moved = {name: a + change if a.dtype.kind == "f" else a for name, a in weights.items()}
        return TrainResult({name: a.astype(weights[name].dtype) for name, a in moved.items()}, 10, 1)

    def evaluate(self, weights):
        return EvalResult(10, {"mean": float(weights["w"].mean())})

    @staticmethod
    def changes(folder: Path):
        """What each training added so far."""
        path = folder / "trained"
        return [float(line) for line in path.read_text().split()] if path.exists() else []

"""A learning task for workers that are killed: it tells in its data folder what it did, and waits when told.

trained     one line for each training begun
wait        while this file is there, training does not end
"""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment
from fedgrpc.trainer import EvalResult, TrainResult


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


class Sliced:
    """A model of eight channels, to all of which a worker adds 1, or what its data folder says in `change`.

    given       the bias that each training began from, its first channel, one line for each
    """

    _MAP = ChannelMap((ChannelGroup(8),), {"w": ((Segment(0),), (Segment(None, 50),)), "b": ((Segment(0),),)})

    def __init__(self, data: Path):
        self.folder = data
        path = data / "change"
        self.change = float(path.read_text()) if path.exists() else 1.0

    def channels(self):
        return self._MAP

    def initial_weights(self):
        return {"w": np.zeros((8, 50), np.float32), "b": np.zeros(8, np.float32)}

    def train(self, weights, job):
        with (self.folder / "given").open("a") as file:
            file.write(f"{weights['b'][0]}\n")
        for _ in job.batches(10, 10):
            time.sleep(0.05)
        moved = {name: (array + self.change).astype(np.float32) for name, array in weights.items()}
        return TrainResult(moved, 10, 1, {}, dict(weights))

    def evaluate(self, weights):
        return EvalResult(10, {"mean": float(weights["w"].mean())})

    @staticmethod
    def given(folder: Path):
        """What each training so far began from."""
        path = folder / "given"
        return [float(line) for line in path.read_text().split()] if path.exists() else []


class Raises(Recorded):
    """Fails in each round."""

    def train(self, weights, job):
        raise RuntimeError("no camera")


class Pooled(Recorded):
    """Uses a pool of forked processes within each training."""

    def train(self, weights, job):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(abs, [-1, -2]).get(60) == [1, 2]
        return super().train(weights, job)


def _idle():
    """Sleep, without the output of the parent: whoever reads that waits for its end."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    time.sleep(600)


class Orphaning(Recorded):
    """Forks a process that outlives the worker, and tells its number in the file `child`."""

    def train(self, weights, job):
        child = multiprocessing.get_context("fork").Process(target=_idle)
        child.start()
        (self.folder / "child").write_text(str(child.pid))
        return super().train(weights, job)

"""A worker in this process with a scripted aggregator, for the tests of its loop."""

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np

from fedgrpc.rpc.retry import Backoff
from fedgrpc.trainer import Cancelled, EvalResult, TrainResult
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.fake_aggregator import PATIENCE_S, model, serving


class AddOneTrainer:
    """Trains by adding one to every float and counting a step; scores are the mean weight."""

    def __init__(self, steps=1, gate=None):
        self.steps = steps
        self.gate = gate
        self.trained = 0
        self.started = threading.Event()

    def initial_weights(self):
        return model(42)

    def train(self, weights, job):
        self.started.set()
        done = 0
        for _ in range(self.steps):
            if job.stop():
                raise Cancelled
            if self.gate is not None:
                self.gate.wait(0.02)
            done += 1
            job.report(done, self.steps)
        self.trained += 1
        trained = {name: array + np.array(1, array.dtype) for name, array in weights.items()}
        return TrainResult(trained, example_count=64, steps=done, metrics={"train_loss": 0.5})

    def evaluate(self, weights):
        return EvalResult(16, {"mean": float(weights["weight"].mean())})


def worker_settings(address, tmp_path, **changes):
    values = {"serve_address": None, "backoff": Backoff(0.02, 0.1), **changes}
    return WorkerSettings(name="pi-1", aggregator=address, state_dir=tmp_path / "state", **values)


async def run_against(peer, tmp_path, trainer=None, timeout_s=PATIENCE_S, **changes):
    """A worker's whole life with a peer that serves for as long."""
    async with serving(peer) as server:
        task = run_worker(worker_settings(server.address, tmp_path, **changes), trainer or AddOneTrainer())
        return await asyncio.wait_for(task, timeout_s)


@asynccontextmanager
async def running_worker(worker):
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.stop()
        await asyncio.wait_for(task, PATIENCE_S)


def spooled(tmp_path):
    return sorted(path.name for path in (tmp_path / "state" / "spool").iterdir() if path.name.isdigit())

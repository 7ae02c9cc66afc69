"""fedgrpc itself: a real aggregator and real workers, whose trainer adds noise.

A round lasts from the commit of one model version to the commit of the next: polls, leases, heartbeats, digests,
admission, the journal and the database are all in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgrpc import logging
from tools.bench.transport.meter import Mark, Usage, rss_mb
from tools.bench.transport.workload import Noise, initial_model, initial_pieces, shapes

# Beyond loopback, where the aggregator serves TLS by itself.
OUTSIDE = "0.0.0.0:0"
_TOKEN = "token"

if TYPE_CHECKING:
    from fedgrpc.aggregator.server import Aggregator
    from fedgrpc.codec.layout import Layout
    from fedgrpc.trainer import TrainJob, TrainResult


def serve(
    pipe: Connection, width: int, workers: int, rounds: int, folder: Path, settings: Mapping[str, object]
) -> None:
    """Process target of the aggregator; `settings` are those of `AggregatorSettings`."""
    logging.configure("warning")
    path = folder / "initial.safetensors"
    write_initial(path, width)
    pipe.send(asyncio.run(_serve(pipe, folder, path, workers, rounds, settings)))


def layout(width: int) -> Layout:
    """The tensors of the model, all of them parameters: the other contestants know no statistics either."""
    from fedgrpc.codec.layout import TensorSpec

    return tuple(TensorSpec(name, "float32", shape) for name, shape in shapes(width).items())


def write_initial(path: Path, width: int) -> None:
    """The model that everyone starts from; in pieces, so that it is not this which is measured as the peak."""
    from fedgrpc.storage.model_file import write_model

    write_model(path, layout(width), initial_pieces(width))


async def _serve(
    pipe: Connection, folder: Path, initial: Path, workers: int, rounds: int, settings: Mapping[str, object]
) -> Usage:
    from fedgrpc.aggregator.server import Aggregator
    from fedgrpc.aggregator.settings import AggregatorSettings
    from fedgrpc.identity.roles import Role
    from fedgrpc.rounds.policy import RoundPolicy

    known = AggregatorSettings(
        folder / "aggregator",
        rounds=rounds,
        policy=RoundPolicy(min_workers=workers, min_sample_size=workers),
        initial_model=initial,
        evaluate=False,
        **{"address": "127.0.0.1:0", **settings},  # type: ignore[arg-type]
    )
    aggregator = Aggregator(known)
    marks: list[Mark] = []
    watching: list[asyncio.Task[None]] = []

    def ready(port: int) -> None:
        if known.has_authority:
            token = aggregator.trust.identities.create_token(Role.TRAINER, time.time(), 600.0, uses=workers)
            (folder / _TOKEN).write_text(token.text)
        pipe.send(port)
        watching.append(asyncio.create_task(watch(aggregator, marks)))

    await aggregator.run(ready)
    for task in watching:
        task.cancel()
    return Usage.of(marks)


async def watch(aggregator: Aggregator, marks: list[Mark]) -> None:
    """A mark at every new version."""
    coordinator, ingest = aggregator.coordinator, aggregator.ingest
    assert coordinator is not None
    version, seen = 0, -1
    while True:
        if coordinator.machine.version != version:
            version = coordinator.machine.version
            marks.append(Mark.now(0.0 if ingest is None else ingest.cpu_s))
        seen = await coordinator.changes.wait(seen)


def work(pipe: Connection, port: int, number: int, width: int, folder: Path) -> None:
    """Process target of a worker."""
    logging.configure("warning")
    pipe.send(asyncio.run(take_part(port, number, folder, width)))


async def take_part(port: int, number: int, folder: Path, width: int | None = None) -> Usage:
    from fedgrpc.worker.process import run_worker
    from fedgrpc.worker.settings import WorkerSettings

    trainer = _NoiseTrainer(number)
    own_rss_mb = 0.0 if width is None else _with_model_mb(width)
    name = f"worker-{number}"
    token = folder / _TOKEN
    settings = WorkerSettings(
        name=name,
        aggregator=f"127.0.0.1:{port}",
        state_dir=folder / name,
        serve_address=None,
        join=token.read_text() if token.exists() else None,
    )
    await run_worker(settings, trainer)
    return replace(Usage.of(trainer.marks), own_rss_mb=own_rss_mb)


def _with_model_mb(width: int) -> float:
    """Resident memory while one model is held, as every trainer holds the one that it trains."""
    model = initial_model(width)
    taken_mb = rss_mb()
    del model
    return taken_mb


class _NoiseTrainer:
    """A `fedgrpc.trainer.Trainer` that trains nothing."""

    def __init__(self, number: int) -> None:
        self._noise = Noise(number)
        self.marks: list[Mark] = []

    def initial_weights(self) -> dict[str, np.ndarray]:
        return initial_model(10)

    def train(self, weights: Mapping[str, np.ndarray], job: TrainJob) -> TrainResult:
        from fedgrpc.trainer import TrainResult

        self.marks.append(Mark.now())
        self._noise.shift()
        return TrainResult({name: self._noise.add_to(values) for name, values in weights.items()}, 10, 1, {})

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> None:
        return None

"""Calls and CPU of a task of a small model: one worker and the aggregator in this one process, over loopback.

    python -m tools.bench.small_tasks [--kib 32] [--rounds 60] [--not-durable]

CPU is that of both ends and of grpc between them, the median round; the first rounds are dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc import logging
from fedgrpc.aggregator.host_service import HostService
from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.storage.model_file import write_model
from fedgrpc.trainer import TrainJob, TrainResult
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings

_CALLS = ("PollTask", "PullModel", "PushUpdate", "QueryPush", "Heartbeat")
_DROPPED = 5


class _Shift:
    """A trainer that adds one, and notes when it was asked to."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self.marks: list[tuple[float, float]] = []

    def initial_weights(self) -> dict[str, np.ndarray]:
        return {"w": np.zeros(self._elements, np.float32)}

    def train(self, weights: Mapping[str, np.ndarray], job: TrainJob) -> TrainResult:
        self.marks.append((time.process_time(), time.perf_counter()))
        return TrainResult({name: values + 1 for name, values in weights.items()}, 10, 1, {})

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, default=32, help="size of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="more than 6 (default: %(default)s)")
    parser.add_argument("--not-durable", action="store_true")
    options = parser.parse_args()
    if options.rounds < _DROPPED + 2:
        parser.error(f"more than {_DROPPED + 1} rounds are needed")
    logging.configure("warning")
    with tempfile.TemporaryDirectory(prefix="fedgrpc-bench-") as name:
        print(asyncio.run(_measured(Path(name), options)))


async def _measured(folder: Path, options: argparse.Namespace) -> str:
    calls, trainer, model = Counter[str](), _Shift(256 * options.kib), folder / "initial.safetensors"
    for method in _CALLS:
        setattr(HostService, method, _counted(method, getattr(HostService, method), calls))
    layout = (TensorSpec("w", "float32", (256 * options.kib,)),)
    write_model(model, layout, trainer.initial_weights().values())
    settings = AggregatorSettings(
        folder / "aggregator",
        address="127.0.0.1:0",
        rounds=options.rounds,
        policy=RoundPolicy(min_workers=1, min_sample_size=1),
        initial_model=model,
        evaluate=False,
        durable=not options.not_durable,
        download_recipe="raw",
        upload_recipe="raw",
    )
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(Aggregator(settings).run(ready.set_result))
        address = f"127.0.0.1:{await ready}"
        about = WorkerSettings(name="worker", aggregator=address, state_dir=folder / "worker", serve_address=None)
        await run_worker(about, trainer)
    cpu_s, wall_s = np.median(np.diff(np.array(trainer.marks), axis=0)[_DROPPED:], axis=0)
    tasks = ", ".join(f"{name} {count / options.rounds:.2f}" for name, count in sorted(calls.items()))
    return f"{options.kib} KiB: CPU {1e3 * cpu_s:.1f} ms, wall {1e3 * wall_s:.1f} ms a round; a task: {tasks}"


def _counted(method: str, serve: Callable[..., Awaitable[Any]], calls: Counter[str]) -> Callable[..., Any]:
    async def counted(self: HostService, request: Any, context: Any) -> Any:
        calls[method] += 1
        return await serve(self, request, context)

    return counted


if __name__ == "__main__":
    main()

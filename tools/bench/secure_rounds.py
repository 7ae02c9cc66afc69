"""Round times, bytes and CPU of real rounds over gRPC, with secure aggregation and without, side by side.

    python -m tools.bench.secure_rounds --workers 16 --elements 2500000 --rounds 3 --turns 2

Each turn plays a run without (int8+zstd both ways) and one with `--secure-aggregation 8`: an aggregator in a
process of its own, and all workers in this one. Training adds small random numbers, so rounds consist of their
transfers and of what is done with updates. The first round, in which all pull the whole model, is left out. CPU is
that of each process over all rounds, over their number; the workers' is that of one. The clock is shared with
whatever runs beside, so compare within a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from safetensors.numpy import save_file

from fedgrpc.calls import connect
from fedgrpc.logging import configure
from fedgrpc.trainer import EvalResult, Trainer, TrainJob, TrainResult, Weights
from fedgrpc.v1 import round_pb2
from fedgrpc.v1.aggregator_pb2 import RUN_PHASE_FINISHED
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings

_TENSORS = 20
_MODES = {"plain": (), "secure": ("--secure-aggregation", "8")}


class RandomWalk:
    """A trainer whose steps cost almost nothing."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def initial_weights(self) -> Weights:
        return {}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Add numbers of a deviation of 0.001 to every element."""
        moved = {
            name: array + 1e-3 * self._rng.standard_normal(array.shape, np.float32)
            for name, array in weights.items()
        }
        return TrainResult(moved, 10, 1, {})

    def evaluate(self, weights: Weights) -> EvalResult | None:
        return None


@dataclass
class Turn:
    """Figures of one run: seconds of its rounds, bytes that one worker sends, CPU seconds a round."""

    rounds_s: list[float]
    upload_bytes: float
    aggregator_cpu_s: float
    worker_cpu_s: float


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def finished(
    folder: Path, flags: Sequence[str | Path], trainers: Sequence[Trainer]
) -> tuple[list[round_pb2.Round], float]:
    """Play one run with a worker for each trainer: its rounds of training, and the aggregator's CPU seconds."""
    port_file = folder / "port"
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedgrpc", "aggregator", "--data-dir", folder / "aggregator"),
        *("--address", "127.0.0.1:0", "--port-file", port_file, "--min-workers", str(len(trainers))),
        *("--quorum", "3", "--stay", "--no-evaluate", "--deadline", "1h", "--lease", "5m"),
        *("--selection-window", "60s", "--log-level", "warning", *flags),
    )
    try:
        # Another process writes it.
        while not port_file.exists() or not port_file.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        address = f"127.0.0.1:{port_file.read_text().strip()}"
        workers = [
            asyncio.create_task(
                run_worker(WorkerSettings(f"w{k}", address, folder / f"w{k}", serve_address=None), trainer)
            )
            for k, trainer in enumerate(trainers)
        ]
        before = cpu_of(started.pid)
        async with connect(address) as operator:
            while (await operator.run()).phase != RUN_PHASE_FINISHED:  # noqa: ASYNC110 - a look now and then
                await asyncio.sleep(0.5)
            records = [each for each in await operator.all_rounds() if each.kind == TASK_KIND_TRAIN]
        cpu_s = cpu_of(started.pid) - before
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    finally:
        started.terminate()
        await started.wait()
    return sorted(records, key=lambda each: each.number), cpu_s


async def played(folder: Path, mode: str, arguments: argparse.Namespace) -> Turn:
    """Play one run, and return its figures."""
    rounds, count, begun = arguments.rounds + 1, arguments.workers, time.process_time()
    model = ("--initial-model", folder.parent / "model.safetensors")
    flags = (*model, "--rounds", str(rounds), "--clip-norm", "1000", *_MODES[mode])
    records, cpu_s = await finished(folder, flags, [RandomWalk(k) for k in range(count)])
    own_s = time.process_time() - begun
    seconds = [each.duration_seconds for each in records[1:]]
    sent = [task.upload_bytes for each in records[1:] for task in each.tasks]
    return Turn(seconds, mean(sent), cpu_s / rounds, own_s / rounds / count)


async def compare(arguments: argparse.Namespace) -> None:
    """Play the turns, and print the figures of each mode."""
    turns: dict[str, list[Turn]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        rng = np.random.default_rng(0)
        size = arguments.elements // _TENSORS
        model = {f"t{k}": 0.05 * rng.standard_normal(size).astype(np.float32) for k in range(_TENSORS)}
        save_file(model, Path(place) / "model.safetensors")
        for number in range(arguments.turns):
            for mode in _MODES:
                folder = Path(place) / f"{mode}{number}"
                folder.mkdir()
                turn = await played(folder, mode, arguments)
                turns[mode].append(turn)
                seconds = " ".join(f"{each:.2f}" for each in turn.rounds_s)
                print(f"turn {number} {mode:6} rounds {seconds} s, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"{arguments.workers} workers, {arguments.elements} elements, {arguments.rounds} rounds a run")
    for mode, its in turns.items():
        seconds = median(each for turn in its for each in turn.rounds_s)
        print(
            f"{mode:6} round {seconds:.2f} s, sent {mean(t.upload_bytes for t in its) / 1e6:.2f} MB a worker, CPU "
            f"{mean(t.aggregator_cpu_s for t in its):.2f} s the aggregator, "
            f"{mean(t.worker_cpu_s for t in its):.2f} s a worker"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--elements", type=int, default=2_500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    configure("warning")
    asyncio.run(compare(parser.parse_args()))


if __name__ == "__main__":
    main()

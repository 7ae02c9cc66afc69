"""Enrolment of a fleet: so many workers join one aggregator with one token, over TLS, and play a round.

    python -m tools.bench.enrolment [--devices 50] [--at-once N] [--json FILE]

Aggregator and workers are processes of the command line, all on this machine. Each worker trains a NumPy model of
100 numbers. Time runs from the start of the first worker's process, so the start of Python for each device is in
it. `--at-once` bounds how many are starting at a time: devices in the field have processors of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.calls import Calls
from fedgrpc.cli.reach import reached
from fedgrpc.trainer import TrainJob, TrainResult
from fedgrpc.v1 import aggregator_pb2 as pb
from tools.bench.load.workers import PATIENCE_S

_LOOK_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


class LightTrainer:
    """A `fedgrpc.trainer.Trainer` of a hundred numbers."""

    def initial_weights(self) -> dict[str, np.ndarray]:
        return {"w": np.zeros(100, np.float32)}

    def train(self, weights: Mapping[str, np.ndarray], job: TrainJob) -> TrainResult:
        return TrainResult({name: values + np.float32(0.01) for name, values in weights.items()}, 10, 1, {})

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> None:
        return None


class Fleet:
    """Processes of one aggregator and its workers, which end with the block."""

    def __init__(self, folder: Path, devices: int) -> None:
        self.folder, self.devices = folder, devices
        self.data = folder / "data"
        self._processes: list[subprocess.Popen[bytes]] = []
        ports = folder / "port"
        self._aggregator = self._start(
            *("aggregator", "--address", "0.0.0.0:0", "--data-dir", self.data, "--port-file", ports),
            *("--task", "tools.bench.enrolment:LightTrainer", "--no-evaluate", "--rounds", 1, "--stay"),
            *("--min-workers", devices, "--max-participants", devices, "--deadline", "10m"),
        )
        _wait(lambda: ports.exists() and ports.read_text().strip() != "", "the aggregator does not start")
        self.address = f"127.0.0.1:{ports.read_text().strip()}"
        self.token = folder / "token"
        command = [sys.executable, "-m", "fedgrpc", "token", "create", "--uses", str(devices)]
        made = subprocess.run([*command, "--data-dir", str(self.data)], check=True, capture_output=True)
        self.token.write_bytes(made.stdout)

    def _start(self, *arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fedgrpc", *map(str, arguments), "--log-level", "warning"]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self._processes.append(process)
        return process

    def start_worker(self, number: int) -> None:
        """Start one device's worker."""
        self._start(
            *("worker", "--aggregator", self.address, "--join", self.token, "--name", f"pi-{number}"),
            *("--task", "tools.bench.enrolment:LightTrainer", "--state-dir", self.folder / f"pi-{number}"),
            *("--serve-address", "none"),
        )

    @property
    def cpu_s(self) -> float:
        """User and system time of the aggregator so far."""
        fields = Path(f"/proc/{self._aggregator.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    begun = time.monotonic()
    while not condition():
        if time.monotonic() > begun + PATIENCE_S:
            raise SystemExit(otherwise)
        time.sleep(_LOOK_S)


async def measure(fleet: Fleet, at_once: int) -> dict[str, float]:
    """Start the workers; return seconds until all have joined, registered and played a round, and CPU seconds."""
    found: dict[str, float] = {}
    begun, cpu_s = time.perf_counter(), fleet.cpu_s
    started = 0
    async with reached({"data_dir": fleet.data}) as client:
        while "round_s" not in found:
            joined, registered = len(await client.identities.members()), len(await client.workers())
            while started < min(fleet.devices, registered + at_once):
                started += 1
                fleet.start_worker(started)
            now_s = time.perf_counter() - begun
            if now_s > PATIENCE_S:
                raise SystemExit(f"only {joined} joined and {registered} registered within {PATIENCE_S:g} s")
            if joined == fleet.devices:
                found.setdefault("joined_s", now_s)
            if registered == fleet.devices and "registered_s" not in found:
                found |= {"registered_s": now_s, "aggregator_cpu_s": fleet.cpu_s - cpu_s}
            if await _is_played(client):
                found |= {"round_s": now_s, "aggregator_cpu_with_round_s": fleet.cpu_s - cpu_s}
            await asyncio.sleep(_LOOK_S)
    return found


async def _is_played(client: Calls) -> bool:
    return (await client.run()).phase == pb.RUN_PHASE_FINISHED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=None, help="workers that start at a time; without: all")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedgrpc-bench-")))
        fleet = stack.enter_context(closing(Fleet(folder, args.devices)))
        found: dict[str, Any] = asyncio.run(measure(fleet, args.at_once or args.devices))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    found |= {"all_processes_cpu_s": usage.ru_utime + usage.ru_stime, "load_before": load}
    print(f"{args.devices} devices; load average before: {load:.1f}; {os.cpu_count()} cores")
    for name, value in found.items():
        print(f"{name:28} {value:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

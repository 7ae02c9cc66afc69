"""The demo's five devices as real processes over gRPC, and simulated: the same versions, and how long rounds take.

    python -m tools.bench.simulated_rounds --encoding int8+zstd
    python -m tools.bench.simulated_rounds --pace 864 --links 0.01

The speed of a device is that of this machine, measured right before (`fedgrpc profile`), divided by its slowdown.
On a machine whose speed changes with its load that says little. With `--pace` the processes are devices that train
so many examples in a second, divided by their slowdown: what is compared is all but the speed of the processor.
`--links` makes their links so many times faster, so that transfers take a part of the round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli.demo.processes import DeviceClass, make_fleet
from fedgrpc.cli.profile import measure
from fedgrpc.logging import configure
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.simulation.fleet import DeviceKind
from fedgrpc.simulation.learning.engine import InProcess
from fedgrpc.simulation.learning.experiment import Experiment, Learning
from fedgrpc.simulation.learning.run import LearningRun
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN, TaskPhase
from fedgrpc.worker.task_loader import load_trainer
from tools.bench.paced import SCORED_FASTER

TASK = "fedgrpc.tasks.digits"
PACED = "tools.bench.paced:PacedDigits"
PARTITION = "dirichlet:0.5"
DEVICES = 5


@dataclass(frozen=True)
class Setup:
    """What is played."""

    encoding: str
    rounds: int
    epochs: float
    pace: float | None
    links: float

    def devices(self) -> Iterator[tuple[int, DeviceClass]]:
        """Return the demo's devices with their numbers, and the links that they have here."""
        for number, device in enumerate(make_fleet(DEVICES), 1):
            kind = device.device_class
            yield number, replace(kind, link_bits_per_second=int(kind.link_bits_per_second * self.links))


def _start(stack: ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedgrpc", *arguments, "--log-level", "error"], env=environment
    )
    stack.callback(process.kill)
    return process


def deployed(folder: Path, setup: Setup) -> None:
    """Play the run as real processes."""
    port = folder / "port"
    os.mkfifo(port)
    with ExitStack() as stack:
        aggregator = _start(
            stack,
            *("aggregator", "--address", "127.0.0.1:0", "--data-dir", str(folder / "run")),
            *("--port-file", str(port), "--rounds", str(setup.rounds), "--epochs", str(setup.epochs)),
            *("--min-workers", str(DEVICES), "--encoding", setup.encoding, "--seed", "1", "--run-name", "truth"),
            *("--keep-versions", "100", "--deadline", "10m"),
        )
        address = f"127.0.0.1:{port.read_text().strip()}"
        for number, kind in setup.devices():
            speed = ["--task", TASK, "--slowdown", str(kind.slowdown)]
            if setup.pace is not None:
                speed = ["--task", PACED, "--option", f"pace={setup.pace / kind.slowdown}"]
            _start(
                stack,
                *("worker", "--aggregator", address, "--name", f"device{number}-0", *speed),
                *("--partition", PARTITION, "--part", f"{number}/{DEVICES}", "--threads", "1", "--device", "cpu"),
                *("--link", str(kind.link_bits_per_second)),
                *("--profile", "memory_bytes=8589934592", "--state-dir", str(folder / f"device{number}")),
                *("--serve-address", "none"),
            )
        aggregator.wait()


def _speeds(setup: Setup) -> Mapping[str, float]:
    """Return the speed of a device without slowdown: what the processes keep to, or what this machine has now."""
    if setup.pace is not None:
        return {"examples_per_s": setup.pace, "scored_per_s": SCORED_FASTER * setup.pace, "overhead_s": 0.0}
    trainer = load_trainer(TASK, device="cpu", threads=1)
    return measure(trainer, trainer.initial_weights(), 3.0)


def simulated(folder: Path, setup: Setup) -> None:
    """Play the same run with devices that are described."""
    measured, kinds = _speeds(setup), []
    for number, kind in setup.devices():
        mbit = kind.link_bits_per_second / 1e6
        kinds.append(
            DeviceKind(
                f"device{number}",
                1,
                up_mbit=mbit,
                down_mbit=mbit,
                examples_per_s=measured["examples_per_s"] / kind.slowdown,
                scored_per_s=measured["scored_per_s"] / kind.slowdown,
                overhead_s=measured["overhead_s"],
                latency_s=0.001,
                spread=0.0,
                jitter=0.0,
                memory_mb=8192,
            )
        )
    settings = AggregatorSettings(
        Path(),
        rounds=setup.rounds,
        policy=RoundPolicy(min_workers=DEVICES, deadline_s=600.0),
        plan=TrainingPlan(epochs=setup.epochs),
        upload_recipe=setup.encoding,
        download_recipe=setup.encoding,
        seed=1,
        run_name="truth",
        keep_versions=100,
    )
    learning = Learning(TASK, partition=PARTITION, evaluate_every=0)
    experiment = Experiment(tuple(kinds), learning, settings)
    LearningRun(experiment, folder, InProcess(learning, DEVICES)).run()


Told = tuple[dict[int, str], dict[int, list[str]], dict[int, float]]


def told(folder: Path) -> Told:
    """Return versions, participation and durations by round, as the aggregator has recorded them."""
    store = RunStore(folder / DATABASE, read_only=True)
    records = [each for each in store.rounds(1 << 62, 1000)[0] if each.kind == TASK_KIND_TRAIN]
    versions = {each.round: each.sha256.hex() for each in store.versions(range(1, 1000))}
    store.close()
    there = {
        r.number: sorted(t.worker for t in r.tasks if t.phase == TaskPhase.TASK_PHASE_ACCEPTED) for r in records
    }
    return versions, there, {r.number: r.duration_seconds for r in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoding", default="int8+zstd")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--pace", type=float, help="examples a second that a device without slowdown trains")
    parser.add_argument("--links", type=float, default=1.0, help="times as fast as the demo's")
    asked = parser.parse_args()
    setup = Setup(asked.encoding, asked.rounds, asked.epochs, asked.pace, asked.links)
    configure("error", "console")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Before and after: the load of the machine may change meanwhile.
        simulated(folder / "before", setup)
        deployed(folder, setup)
        simulated(folder / "after", setup)
        real = told(folder / "run")
        before, after = told(folder / "before" / "run"), told(folder / "after" / "run")
    print(f"{asked.encoding}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"versions equal: {real[0] == before[0] == after[0]}; participation equal: {real[1] == before[1]}")
    print(f"{'round':>5} {'measured':>9} {'predicted before':>17} {'and after':>10} {'error of the mean':>18}")
    errors = []
    for number, seconds in sorted(real[2].items()):
        mean = (before[2][number] + after[2][number]) / 2
        errors.append(mean / seconds - 1)
        predicted = f"{before[2][number]:>16.2f}s {after[2][number]:>9.2f}s"
        print(f"{number:>5} {seconds:>8.2f}s {predicted} {errors[-1]:>17.0%}")
    print(f"median error {statistics.median(errors):.0%}")


if __name__ == "__main__":
    main()

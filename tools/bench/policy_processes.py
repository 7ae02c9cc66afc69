"""Policies of a sweep as real processes over gRPC, beside their simulation: do they rank the same?

    python -m tools.bench.policy_processes --out processes
    python -m tools.bench.policy_processes --out processes --containers      (root, podman, make images)

Each policy of examples/policies/processes-grid.toml is one aggregator, a worker for each device and an evaluator.
Devices keep to the described speed (`tools.bench.paced`) and link. In containers each device has 1 GiB of memory
and the aggregator 256 MiB, and the kernel shapes the links. A policy that is done under --out is not played again.
The simulation is of the same files. Hours count from the first round that trains.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fedgrpc import toml
from fedgrpc.cli.experiment import parse_experiment
from fedgrpc.logging import configure
from fedgrpc.simulation.learning.engine import InProcess
from fedgrpc.simulation.learning.sweep import Point, play_points, points_of, search_of
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.submodels.plan_size import elements_of, relative_work
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN
from fedgrpc.worker.task_loader import load_trainer
from tools.containers.devices import AGGREGATOR
from tools.containers.network import Network
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, Container, Limits, why_not

GRID = Path("examples/policies/processes-grid.toml")
PACED = "tools.bench.paced:PacedFashionMnist"
CONTAINERS = "fgpolicy"
DEVICE = Limits(1 << 30)
# As docker/ has them.
_USER = 10001
_HOME = "/var/lib/fedgrpc"
_CONFIG = "/etc/aggregator.toml"
_EXAMPLES = f"{_HOME}/examples:ro"
_SECONDS = 3600.0
# Scores swing from version to version, so that each is the mean of so many.
_LAST = 3
_HEADINGS = "| policy | played as | 12 h | 24 h | 12 to 24 h | versions | MB |"


@dataclass(frozen=True)
class Scored:
    """A version of a run: seconds since the first round began, bytes of all rounds until then, and accuracy."""

    at_s: float
    moved_bytes: int
    accuracy: float | None


class Processes(AbstractContextManager["Processes"]):
    """Processes of this machine, in its own folder; workers pace their links themselves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def aggregator(self, config: Path) -> str:
        """Start it, and return its address."""
        port = self._folder / "port"
        os.mkfifo(port)
        serving = ("--address", "127.0.0.1:0", "--port-file", str(port), "--data-dir", str(self._folder / "run"))
        self._start("aggregator", "aggregator", "--config", str(config), *serving)
        return f"127.0.0.1:{port.read_text().strip()}"

    def worker(self, name: str, bits_per_second: int | None, arguments: list[str]) -> None:
        """Start one, at the end of a link of this rate."""
        link = [] if bits_per_second is None else ["--link", str(bits_per_second)]
        self._start(name, *arguments, *link, "--serve-address", "none", "--state-dir", str(self._folder / name))

    def _start(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = self._stack.enter_context((self._folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "fedgrpc", *arguments], env=environment, stdout=output, stderr=output
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)


class Containers(AbstractContextManager["Containers"]):
    """Containers with a network of their own, which see of this machine the data and the task."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._stack = ExitStack()
        self._network = self._stack.enter_context(Network(CONTAINERS))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def aggregator(self, config: Path) -> str:
        """Start it, and return its address."""
        run = self._folder / "run"
        run.mkdir()
        os.chown(run, _USER, _USER)
        # The folder of examples is where the configuration looks for it, below the working folder.
        mounts = {
            str(run): _HOME,
            str(config.resolve()): f"{_CONFIG}:ro",
            str(Path("examples").resolve()): _EXAMPLES,
        }
        address = self._start("aggregator", None, ["aggregator", "--config", _CONFIG], mounts)
        return f"{address}:50051"

    def worker(self, name: str, bits_per_second: int | None, arguments: list[str]) -> None:
        """Start one, at the end of a link of this rate."""
        data, task = Path("shares").resolve(), Path(__file__).with_name("paced.py").resolve()
        mounts = {
            str(data): f"{_HOME}/shares:ro",
            str(task): f"/tasks/{PACED.partition(':')[0].replace('.', '/')}.py:ro",
        }
        self._start(name, bits_per_second, arguments, mounts)

    def _start(
        self, name: str, bits_per_second: int | None, arguments: list[str], mounts: Mapping[str, str]
    ) -> str:
        link = self._network.attach(name, bits_per_second)
        if bits_per_second is not None and not link.shaped:
            raise SystemExit("the kernel shapes no links here")
        aggregates = arguments[0] == "aggregator"
        image, limits = (AGGREGATOR_IMAGE, AGGREGATOR) if aggregates else (WORKER_IMAGE, DEVICE)
        full, log = f"{CONTAINERS}-{name}", self._folder / f"{name}.log"
        container = Container(full, image, limits, link.podman_network, arguments, mounts, log)
        container.remove()
        container.start()
        self._stack.callback(container.remove)
        return link.address


def deployed(point: Point, folder: Path, place: type[Processes] | type[Containers]) -> None:
    """Play a policy with real processes for its hours, from the moment when all of them are there."""
    folder.mkdir(parents=True)
    config = folder / "aggregator.toml"
    config.write_text("[aggregator]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in _table(point).items()))
    devices = [(f"{kind.name}-{n}", kind) for kind in point.experiment.classes for n in range(kind.count)]
    learning, paces = point.experiment.learning, _paces(point)
    with place(folder) as here:
        address = here.aggregator(config)
        common = [
            *("--aggregator", address, "--data", str(learning.data), "--model", str(learning.model)),
            *("--threads", "1", "--device", "cpu"),
        ]
        for number, (name, kind) in enumerate(devices, 1):
            arguments = [
                *("worker", "--name", name, "--task", PACED, "--option", f"pace={paces[kind.name]}", *common),
                *("--partition", str(learning.partition), "--part", f"{number}/{len(devices)}"),
                *("--seed", str(learning.seed), "--device-class", kind.device_class or kind.name),
            ]
            here.worker(name, int(kind.up_mbit * 1e6), arguments)
        here.worker(
            "evaluator",
            None,
            ["worker", "--name", "evaluator", "--role", "evaluator", "--task", learning.task, *common],
        )
        _wait(folder / "run", point.hours * _SECONDS)


def _paces(point: Point) -> dict[str, float]:
    """Return examples a second of each kind, with a smaller model as many more as the simulation takes."""
    learning, plans = point.experiment.learning, point.experiment.settings.local_models
    engine = InProcess(learning, point.experiment.count)
    trainer = load_trainer(learning.task, model=learning.model, data=Path(str(learning.data)), threads=1)
    shapes = {name: array.shape for name, array in trainer.initial_weights().items()}
    channels = engine.facts(True).description.channels
    paces = {}
    for kind in point.experiment.classes:
        size = elements_of(plans.plan_of(kind.device_class or kind.name), shapes, channels).size(0.0, 0.0)
        assert kind.examples_per_s is not None
        paces[kind.name] = kind.examples_per_s / relative_work(size)
    return paces


def _table(point: Point) -> Mapping[str, Any]:
    table = {"seed": point.seed, "run_name": "policy", "insecure": True, **point.experiment.document["aggregator"]}
    return {name.replace("-", "_"): value for name, value in table.items()}


def _wait(run: Path, seconds: float) -> None:
    """Wait until so many seconds have passed since the first round that trains was opened."""
    while not (versions := scored(run)) or versions[-1].at_s < seconds:
        if versions:
            time.sleep(max(1.0, min(20.0, seconds - versions[-1].at_s)))
        time.sleep(2.0)


def scored(run: Path) -> list[Scored]:
    """Return the versions that rounds have made, from the aggregator's records."""
    if not (run / DATABASE).exists():
        return []
    store = RunStore(run / DATABASE, read_only=True)
    try:
        records = [each for each in store.rounds(1 << 62, 1 << 31)[0] if each.kind == TASK_KIND_TRAIN]
    finally:
        store.close()
    found, moved = [], 0
    records.sort(key=lambda record: record.number)
    for record in records:
        moved += sum(task.download_bytes + task.upload_bytes for task in record.tasks)
        opened_s = record.started_at.ToMicroseconds() / 1e6 - records[0].started_at.ToMicroseconds() / 1e6
        accuracy = record.evaluator_metrics.get("accuracy")
        if record.committed_version:
            found.append(Scored(opened_s + record.duration_seconds, moved, accuracy))
    return found


def played(point: Point, folder: Path, place: type[Processes] | type[Containers]) -> list[Scored]:
    """Return the versions of a policy with real processes."""
    done = folder / "versions.json"
    if not done.exists():
        deployed(point, folder, place)
        done.write_text(json.dumps([asdict(each) for each in scored(folder / "run")]))
    return [Scored(**each) for each in json.loads(done.read_text())]


def simulated(points: list[Point], folder: Path) -> list[list[Scored]]:
    """Return the versions of each policy in its simulation."""
    rows = play_points(points, folder, 1)
    return [
        [
            Scored(row.virtual_h * _SECONDS, row.down_bytes + row.up_bytes, row.scores.get("accuracy"))
            for row in rows[point.folder]
            if row.round > 0
        ]
        for point in points
    ]


def shown(versions: list[Scored], seconds: float) -> str:
    """Return accuracies, versions and megabytes as cells of a table."""
    within = [each for each in versions if each.at_s <= seconds]
    scores = [(each.at_s, 100 * each.accuracy) for each in within if each.accuracy is not None]
    first = [accuracy for at_s, accuracy in scores if at_s <= seconds / 2]
    second = [accuracy for at_s, accuracy in scores if at_s > seconds / 2]
    moved = within[-1].moved_bytes / 1e6 if within else 0.0
    means = (first[-_LAST:], second[-_LAST:], second)
    return " | ".join([*(f"{mean(each):.1f}" if each else "-" for each in means), f"{len(within)} | {moved:.1f}"])


def main() -> None:
    """Play what is not done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--policies", nargs="+", help="of the grid; without: all")
    parser.add_argument("--containers", action="store_true", help="each process in a container of its own")
    asked = parser.parse_args()
    if asked.containers and (reason := why_not(AGGREGATOR_IMAGE, WORKER_IMAGE)):
        raise SystemExit(reason)
    configure("error", "console")
    document = toml.parse(asked.grid.read_text())
    base = toml.parse((asked.grid.parent / search_of(document).experiment).read_text())
    points = points_of(document, base, parse_experiment)
    points = [each for each in points if not asked.policies or each.choices["policy"] in asked.policies]
    print(f"{_HEADINGS}\n|{' --- |' * 7}", flush=True)
    for point, versions in zip(points, simulated(points, asked.out / "simulated"), strict=True):
        print(
            f"| {point.choices['policy']} | simulation | {shown(versions, point.hours * _SECONDS)} |", flush=True
        )
    place, name = (Containers, "containers") if asked.containers else (Processes, "processes")
    for point in points:
        policy = str(point.choices["policy"])
        versions = played(point, asked.out / name / policy, place)
        print(f"| {policy} | {name} | {shown(versions, point.hours * _SECONDS)} |", flush=True)


if __name__ == "__main__":
    main()

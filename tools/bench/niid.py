"""NIID-Bench's Fashion-MNIST cells for FedAvg (Li et al., arXiv 2102.02079), over real gRPC and real processes.

    python -m tools.bench.niid --json niid.json      the full 50 rounds of all four cells
    python -m tools.bench.niid --short               a tenth of the work: 5 rounds

Ten parties that all take part, LeNet with 6 and 16 filters, batch 64, learning rate 0.01, momentum 0.9, 10 local
epochs. Each cell is one `fedgrpc aggregator` and ten `fedgrpc worker` on loopback, one thread each. The workers
hold disjoint parts of the test set, so the weighted mean of their accuracies is the accuracy on all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PARTIES = 10
ROUNDS, SHORT_ROUNDS = 50, 5
PUBLISHED = {"iid": 89.0, "dirichlet:0.5": 88.4, "labels:2": 81.0, "labels:3": 83.2}
USUAL = ["iid", "dirichlet:0.5"]
FEDGRPC = [sys.executable, "-m", "fedgrpc"]


@dataclass(frozen=True)
class Cell:
    """One run's settings and outcome; accuracies in percent of the whole test set, one per round."""

    partition: str
    encoding: str
    seed: int
    accuracies: list[float]
    upload_bytes: int
    download_bytes: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """After the last round, as NIID-Bench reports it."""
        return self.accuracies[-1]


@contextmanager
def process(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that has ended when the block has, whatever happens in it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDGRPC_LOG_FORMAT": "json"}
    child = subprocess.Popen([*FEDGRPC, *arguments], text=True, env=environment, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run_cell(partition: str, encoding: str, seed: int, rounds: int, data: Path | None) -> Cell:
    """One federation from its untrained model to its last version."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="niid-") as folder:
        leader = _aggregator_arguments(Path(folder) / "aggregator", encoding, seed, rounds)
        with process(leader, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as aggregator:
            events = _events(aggregator)
            address = f"127.0.0.1:{_wait_for(events, 'serving')['port']}"
            with _workers(address, partition, seed, data, Path(folder)):
                _follow(events, f"{partition} {encoding}", rounds)
            records = _records(address, rounds)
    return _cell(partition, encoding, seed, records, time.monotonic() - started_s)


def _aggregator_arguments(data_dir: Path, encoding: str, seed: int, rounds: int) -> list[str]:
    settings = {
        "address": "127.0.0.1:0", "data-dir": data_dir, "rounds": rounds, "encoding": encoding, "seed": seed,
        "min-workers": PARTIES, "min-sample-size": PARTIES, "quorum": PARTIES, "deadline": "2h", "lease": "5m",
        "task": "fedgrpc.tasks.fashion_mnist", "model": "lenet",
        "epochs": 10, "batch-size": 64, "learning-rate": 0.01, "momentum": 0.9, "log-format": "json",
    }  # fmt: skip
    return ["aggregator", "--stay", *_flags(settings)]


@contextmanager
def _workers(address: str, partition: str, seed: int, data: Path | None, folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        for number in range(1, PARTIES + 1):
            settings = {
                "aggregator": address, "name": f"party-{number}", "state-dir": folder / f"party-{number}",
                "partition": partition, "part": f"{number}/{PARTIES}", "seed": seed, "device": "cpu",
                "threads": 1, "serve-address": "none", "log-format": "json",
            }  # fmt: skip
            flags = _flags(settings) + ([] if data is None else ["--data", str(data)])
            log = stack.enter_context((folder / f"party-{number}.log").open("w"))
            stack.enter_context(process(["worker", *flags], stdout=log, stderr=log))
        yield


def _flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def _events(aggregator: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The aggregator's log; a line that is no event is an error message, and ends the bench."""
    assert aggregator.stdout is not None  # it was started with a pipe
    for line in aggregator.stdout:
        if not line.startswith("{"):
            raise SystemExit(f"the aggregator says: {line.strip()}")
        yield json.loads(line)
    raise SystemExit("the aggregator ended before its run did")


def _wait_for(events: Iterator[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(event for event in events if event["event"] == name)


def _follow(events: Iterator[dict[str, Any]], label: str, rounds: int) -> None:
    """Show each committed round until the run ends."""
    started_s, before = time.monotonic(), ""
    for event in events:
        if event["event"] == "run ended":
            return
        if event["event"] == "version scored" and "accuracy" in event:
            before = f", {100 * event['accuracy']:.2f} % before it"
        if event["event"] == "round committed" and event["round"]:
            done = min(event["round"], rounds)
            elapsed_s = time.monotonic() - started_s
            print(f"{label}: round {done} of {rounds}{before}, {elapsed_s:.0f} s", file=sys.stderr, flush=True)


def _records(address: str, rounds: int) -> list[dict[str, Any]]:
    command = [*FEDGRPC, "status", "--aggregator", address, "--json", "--rounds", str(rounds + 5)]
    status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [record for record in json.loads(status)["rounds"] if record["kind"] == "train"]


def _cell(partition: str, encoding: str, seed: int, records: list[dict[str, Any]], seconds: float) -> Cell:
    records = sorted(records, key=lambda record: int(record["number"]))
    tasks = [task for record in records for task in record["tasks"]]
    if any(task["phase"] != "accepted" for task in tasks):
        raise SystemExit("not every party took part in every round")
    return Cell(
        partition,
        encoding,
        seed,
        [100 * record["metrics"]["accuracy"] for record in records],
        sum(int(task["upload_bytes"]) for task in tasks),
        sum(int(task["download_bytes"]) for task in tasks),
        seconds,
    )


def table(cells: list[Cell], rounds: int) -> str:
    """Ours beside the published figures, as Markdown."""
    published = "NIID-Bench" if rounds == ROUNDS else f"NIID-Bench ({ROUNDS} rounds)"
    ours = f"fedgrpc, {rounds} rounds"
    lines = [f"| Fashion-MNIST, {PARTIES} parties | {published} | {ours} | up, MB | down, MB | minutes |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for cell in cells:
        theirs = f"{PUBLISHED[cell.partition]:.1f}" if cell.partition in PUBLISHED else ""
        up, down = cell.upload_bytes / 1e6, cell.download_bytes / 1e6
        lines.append(
            f"| {cell.partition}, {cell.encoding} | {theirs} | {cell.accuracy:.2f} "
            f"| {up:.1f} | {down:.1f} | {cell.seconds / 60:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT_ROUNDS} rounds, a tenth of the work")
    parser.add_argument("--rounds", type=int, help="this many instead")
    parser.add_argument("--partitions", nargs="+", default=USUAL)
    parser.add_argument("--encodings", nargs="+", default=["raw", "int8+zstd"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--json", type=Path, help="write the cells there, each as soon as it is done")
    asked = parser.parse_args()
    rounds = asked.rounds or (SHORT_ROUNDS if asked.short else ROUNDS)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped"))  # and so ends what it started
    cells: list[Cell] = []
    for partition in asked.partitions:
        for encoding in asked.encodings:
            cells.append(run_cell(partition, encoding, asked.seed, rounds, asked.data))
            print(table(cells, rounds), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


if __name__ == "__main__":
    main()

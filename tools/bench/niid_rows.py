"""NIID-Bench's Fashion-MNIST rows (Li et al., arXiv 2102.02079), simulated: seven partitions, four algorithms.

    python -m tools.bench.niid_rows --out niid                       the whole set-up: a night and more
    python -m tools.bench.niid_rows --out niid --images 6000 --rounds 12 --epochs 5 --seeds 0
    python -m tools.bench.niid_rows --out niid --encodings entropy --algorithms fedavg --partitions iid

Ten parties that all take part, LeNet with 6 and 16 filters, learning rate 0.01, momentum 0.9, weight decay 1e-5.
A cell is one simulation in a folder of its own under --out. One that is done is not played again, and one that was
cut off resumes at its last round. So the same command continues, and prints the table of what is done. Seeds are
the outer loop: after each of them the table is whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.datasets.dataset import LabelledData
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import Iid
from fedgrpc.datasets.shares import save_share
from fedgrpc.logging import configure
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.simulation.fleet import DeviceKind
from fedgrpc.simulation.learning.experiment import Experiment, Learning
from fedgrpc.simulation.learning.play import play
from fedgrpc.training_plan import TrainingPlan

PARTIES = 10
TRAINING_IMAGES = 60_000
PARTITIONS = ("iid", "dirichlet:0.5", "labels:1", "labels:2", "labels:3", "quantity:0.5", "noise:0.1")
ALGORITHMS = ("fedavg", "fedprox:mu=0.01", "scaffold", "fednova")
# Up, whole models down, differences down.
RECIPES = {
    "raw": ("raw", "raw", None),
    "int8": ("int8+zstd", "int8+zstd", "int8+zstd"),
    "entropy": ("entropy", "int8+zstd", "entropy:c=1+zstd"),
}
KIND = DeviceKind("party", PARTIES, 100.0, 100.0, examples_per_s=1000.0, spread=0.0, jitter=0.0)


@dataclass(frozen=True)
class Cell:
    """One simulation: what is asked."""

    partition: str
    algorithm: str
    encoding: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return "-".join(map(str, (self.partition, self.algorithm, self.encoding, self.seed))).replace(":", "_")


@dataclass(frozen=True)
class Outcome:
    """The last version of a cell: accuracy on the test images in percent, and bytes of all rounds."""

    accuracy: float
    down_bytes: int
    up_bytes: int
    seconds: float


@dataclass(frozen=True)
class Setup:
    """How large a cell is."""

    images: int
    epochs: int
    rounds: int
    batch: int
    threads: int

    def experiment(self, cell: Cell, data: Path) -> Experiment:
        """Return the experiment of a cell."""
        up, down, difference = RECIPES[cell.encoding]
        settings = AggregatorSettings(
            Path(),
            rounds=self.rounds,
            policy=RoundPolicy(
                min_workers=PARTIES, min_sample_size=PARTIES, quorum=PARTIES, deadline_s=86400.0, lease_s=3600.0
            ),
            plan=TrainingPlan(
                epochs=self.epochs,
                batch_size=self.batch,
                learning_rate=0.01,
                momentum=0.9,
                weight_decay=1e-5,
                algorithm=cell.algorithm,
            ),
            upload_recipe=up,
            download_recipe=down,
            difference_recipe=difference,
            evaluate=False,
            seed=cell.seed,
        )
        learning = Learning(
            "fedgrpc.tasks.fashion_mnist",
            model="lenet",
            data=str(data),
            partition=cell.partition,
            seed=cell.seed,
            threads=self.threads,
            evaluate_every=self.rounds,
        )
        return Experiment((KIND,), learning, settings)


def images_file(folder: Path, count: int, seed: int) -> Path:
    """Write that many training images, drawn evenly, with all test images, unless the file is there."""
    path = folder / f"images-{count}-{seed}.npz"
    if not path.exists():
        data = load_fashion_mnist()
        drawn = Iid().split(data.train.labels, max(1, TRAINING_IMAGES // count), seed)[0]
        save_share(path, LabelledData(data.train.take(drawn), data.held_out))
    return path


def played(cell: Cell, setup: Setup, folder: Path) -> Outcome:
    """Play a cell, or what is left of it."""
    done = folder / cell.folder / "outcome.json"
    if done.exists():
        return Outcome(**json.loads(done.read_text()))
    began_s = time.process_time()
    experiment = setup.experiment(cell, images_file(folder, setup.images, cell.seed))
    last = play(experiment, folder / cell.folder, seed=cell.seed, engine="inline", resume=True)[-1]
    spent_s = time.process_time() - began_s
    outcome = Outcome(100 * last.scores["accuracy"], last.down_bytes, last.up_bytes, spent_s)
    done.write_text(json.dumps(asdict(outcome)))
    return outcome


def cells_of(asked: argparse.Namespace) -> Iterator[Cell]:
    """Return the cells, all of one seed before the next."""
    for seed in asked.seeds:
        for partition in asked.partitions:
            for encoding in asked.encodings:
                for algorithm in asked.algorithms:
                    yield Cell(partition, algorithm, encoding, seed)


def table(outcomes: dict[Cell, Outcome], algorithms: Sequence[str]) -> str:
    """Return mean and standard deviation over seeds, as Markdown: a row for each partition and encoding."""
    lines = [
        f"| parties' data | encoding | seeds | {' | '.join(algorithms)} | MB down, up ({algorithms[0]}) |",
        "| --- | --- | --: |" + " --: |" * (len(algorithms) + 1),
    ]
    for row in dict.fromkeys((cell.partition, cell.encoding) for cell in outcomes):
        partition, encoding = row
        cells = {cell: each for cell, each in outcomes.items() if (cell.partition, cell.encoding) == row}
        shown = [
            _spread([each.accuracy for cell, each in cells.items() if cell.algorithm == name])
            for name in algorithms
        ]
        first = next((each for cell, each in cells.items() if cell.algorithm == algorithms[0]), None)
        moved = "" if first is None else f"{first.down_bytes / 1e6:.2f}, {first.up_bytes / 1e6:.2f}"
        seeds = len({cell.seed for cell in cells})
        lines.append(f"| {partition} | {encoding} | {seeds} | {' | '.join(shown)} | {moved} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Play what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--partitions", nargs="+", default=PARTITIONS)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--encodings", nargs="+", default=["raw"], choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=TRAINING_IMAGES, help="training images of all parties")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is done, and play nothing")
    asked = parser.parse_args()
    configure("error", "console")
    setup = Setup(asked.images, asked.epochs, asked.rounds, asked.batch, asked.threads)
    folder = asked.out / f"{setup.images}-images-{setup.epochs}-epochs-{setup.rounds}-rounds-{setup.batch}-batch"
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[Cell, Outcome] = {}
    for cell in cells_of(asked):
        if asked.table and not (folder / cell.folder / "outcome.json").exists():
            continue
        outcome = outcomes[cell] = played(cell, setup, folder)
        print(f"{cell.folder}: {outcome.accuracy:.2f} %, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(outcomes, asked.algorithms))


if __name__ == "__main__":
    main()

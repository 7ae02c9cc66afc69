"""The workload in `fedgrpc simulate`, in one process. Run as a script: ROUNDS ENCODING."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fedgrpc.cli.experiment import parse_experiment
from fedgrpc.logging import configure
from fedgrpc.simulation.learning.engine import InProcess
from fedgrpc.simulation.learning.history import RoundRow
from fedgrpc.simulation.learning.run import LearningRun
from tools.bench.simulators.workload import BATCH, CLIENTS, COHORT, LEARNING_RATE, MOMENTUM, tell


def main(rounds: int, encoding: str) -> None:
    """Play that many rounds."""
    configure("error")
    experiment = parse_experiment(
        {
            "learning": {
                "task": "fedgrpc.tasks.fashion_mnist",
                "model": "lenet",
                "partition": "iid",
                "evaluate_every": 0,
            },
            "aggregator": {
                "rounds": rounds,
                "epochs": 1,
                "batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "momentum": MOMENTUM,
                "weight_decay": 0.0,
                "min_workers": COHORT,
                "fraction": COHORT / CLIENTS,
                "deadline": "1h",
                "lease": "5m",
                "evaluate": False,
                "encoding": encoding,
            },
            "devices": [
                {"name": "device", "count": CLIENTS, "examples_per_s": 100.0, "up_mbit": 20.0, "down_mbit": 20.0}
            ],
        }
    )

    def show(row: RoundRow, part: float) -> None:
        if row.kind == "train":
            tell(len(row.workers))

    with tempfile.TemporaryDirectory(prefix="simulators-") as folder:
        engine = InProcess(experiment.learning, experiment.count)
        LearningRun(experiment, Path(folder), engine).run(show=show)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

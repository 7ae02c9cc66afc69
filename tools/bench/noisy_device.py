"""One device of six in a small emulated format: its noise ratio, and the fleet with and without its say.

Digits, six workers, Dirichlet(0.5), 12 rounds of three epochs, in one process: the trainers, the noise that they
measure and the say are those of a run, and updates travel exactly. Score: mean of the last three rounds.

`python -m tools.bench.noisy_device --seed 0 --seed 1` prints one JSON line for each seed, format and rule.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fedgrpc.aggregation.mean import TensorMean
from fedgrpc.aggregation.noise import say
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan
from fedgrpc.tasks.digits import Digits
from fedgrpc.torch.data import labels_of, subset_of
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, Weights

WORKERS = 6
FORMATS = {
    "fixed8.5": Arithmetic("fixed8.5", "stochastic"),
    "fixed8.6, scaled": Arithmetic("fixed8.6", dynamic_loss_scale=True),
    "fixed12.8": Arithmetic("fixed12.8", "stochastic"),
    "float8_e4m3fn": Arithmetic("float8_e4m3fn", "stochastic"),
    "bfloat16, emulated": Arithmetic("bfloat16", emulated=True),
}


class Share(Digits):
    """One worker's digits."""

    def __init__(self, number: int, seed: int) -> None:
        super().__init__()
        self._number, self._seed = number, seed

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """This worker's part, and all held-out digits."""
        train, held_out = super().data(path)
        parts = parse_partition("dirichlet:0.5").split(labels_of(train), WORKERS, self._seed)
        return subset_of(train, parts[self._number]), held_out


def run(arithmetic: Arithmetic | None, by_noise: bool, seed: int, rounds: int) -> tuple[list[float], list[float]]:
    """Accuracy after each round, and the noise ratios of the last device."""
    setup = TaskSetup(device="cpu", seed=seed, threads=1)
    trainers = [TorchTrainer(Share(number, seed), setup) for number in range(WORKERS)]
    plans = [None] * (WORKERS - 1) + [None if arithmetic is None else LocalModelPlan(arithmetic=arithmetic)]
    weights: Weights = trainers[0].initial_weights()
    scores, ratios = [], []
    for number in range(1, rounds + 1):
        means = {name: TensorMean(values.shape) for name, values in weights.items()}
        for place, (trainer, plan) in enumerate(zip(trainers, plans, strict=True)):
            job = TrainJob(epochs=3, seed=(seed << 16) + (place << 8) + number, round=number, local_model=plan)
            result = trainer.train({name: values.copy() for name, values in weights.items()}, job)
            start = weights if result.start is None else result.start
            weight = result.example_count * (say(result.noise_ratio) if by_noise else 1.0)
            for name, mean in means.items():
                mean.add(np.subtract(result.weights[name], start[name], dtype=np.float64), weight)
        weights = {name: (weights[name] + means[name].result()).astype(np.float32) for name in weights}
        ratios.append(result.noise_ratio)
        scored = trainers[0].evaluate(weights)
        assert scored is not None
        scores.append(scored.metrics["accuracy"])
    return scores, ratios


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="without: 0, 1 and 2")
    parser.add_argument("--format", action="append", choices=list(FORMATS), help="without: all")
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, Arithmetic | None, bool]] = [("float32", None, False)]
    rows += [(name, FORMATS[name], rule) for name in asked.format or FORMATS for rule in (False, True)]
    for seed in asked.seed or (0, 1, 2):
        for name, arithmetic, by_noise in rows:
            scores, ratios = run(arithmetic, by_noise, seed, asked.rounds)
            line = {"seed": seed, "format": name, "by_noise": by_noise, "accuracy": statistics.fmean(scores[-3:])}
            print(json.dumps(line | {"noise_ratio": statistics.median(ratios)}), flush=True)


if __name__ == "__main__":
    _main()

"""A fleet of unequal devices on Fashion-MNIST: what mixed local models cost and bring.

Ten workers hold non-IID parts (Dirichlet 0.5): four train the whole model, three half of its channels, three a
quarter, pruned, quantized and clustered. Beside it the fleets to hold it against: all whole, all smallest, and the
small devices left out. The aggregation is the aggregator's own, without the network.

`python tools/mixed_fleet.py --out results.jsonl` writes one JSON line for each fleet, seed and scored round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedgrpc.aggregation.channels import Selection
from fedgrpc.aggregation.compression_plan import Clustering, CompressionPlan, Pruning, Quantization
from fedgrpc.aggregation.coverage import CoordinateMean, Coverage
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.tasks.torch_trainer import TorchTrainer
from fedgrpc.worker.trainer import TaskSetup, TrainJob, Weights

WORKERS = 10


def small(rule: str) -> list[CompressionPlan]:
    """What the three smallest devices do besides training a quarter of the channels."""
    return [
        CompressionPlan(0.25, rule, pruning=Pruning(0.3)),
        CompressionPlan(0.25, rule, quantization=Quantization(8, 8)),
        CompressionPlan(0.25, rule, clustering=Clustering(32, ("fc*",))),
    ]


def fleets() -> dict[str, Sequence[CompressionPlan | None]]:
    """The plan of each worker, by fleet; None stays out."""
    whole = CompressionPlan()
    mixed = {
        f"mixed, {rule}": [whole] * 4 + [CompressionPlan(0.5, rule)] * 3 + small(rule)
        for rule in ("prefix", "rolling")
    }
    return {
        "all whole": [whole] * WORKERS,
        **mixed,
        "all smallest": [CompressionPlan(0.25)] * WORKERS,
        "small left out": [whole] * 4 + [None] * 6,
    }


@dataclass(frozen=True)
class Trained:
    """One worker's part of a round."""

    delta: Mapping[str, np.ndarray]
    coverage: Mapping[str, Coverage]
    example_count: int


def train(trainer: TorchTrainer, plan: CompressionPlan, weights: Weights, job: TrainJob) -> Trained:
    """Slice, compress, train; the difference to where the local model started."""
    sub_model = plan.sub_model(job.round)
    selection: Selection = trainer.channels().select(sub_model, weights)
    coverage = {name: selection.coverage(name, array.shape) for name, array in weights.items()}
    given = {name: coverage[name].take(array).copy() for name, array in weights.items()}
    compression = None if plan.plain else plan
    result = trainer.train(given, TrainJob(**{**vars(job), "compression": compression}))
    start = given if result.start is None else result.start
    delta = {name: array - start[name] for name, array in result.weights.items()}
    for name, mask in result.masks.items():
        coverage[name] = coverage[name].masked(mask)
        delta[name] = delta[name][mask]
    return Trained(delta, coverage, result.example_count)


def averaged(weights: Weights, parts: Sequence[Trained]) -> dict[str, np.ndarray]:
    """Each coordinate's mean over those who trained it, added to the model."""
    new = {}
    for name, array in weights.items():
        mean = CoordinateMean(array.shape)
        for part in parts:
            mean.add(part.delta[name], part.example_count, part.coverage[name])
        new[name] = array if mean.covers_nothing else (array + mean.result()).astype(array.dtype)
    return new


def run(
    plans: Sequence[CompressionPlan | None], asked: argparse.Namespace, seed: int
) -> Iterator[dict[str, float]]:
    """Scores of the global model on all held-out examples, every few rounds."""

    def build(part: str | None) -> TorchTrainer:
        partition = None if part is None else "dirichlet:0.5"
        return FashionMnist.build_trainer(TaskSetup(asked.model, None, "cpu", partition, part, seed))

    trainers = [build(f"{number + 1}/{WORKERS}") for number in range(WORKERS)]
    judge = build(None)
    weights = judge.initial_weights()
    for number in range(1, asked.rounds + 1):
        job = TrainJob(
            epochs=asked.epochs,
            max_steps=asked.max_steps,
            learning_rate=0.05,
            momentum=0.9,
            seed=seed,
            round=number,
        )
        parts = [
            train(trainer, plan, weights, job)
            for trainer, plan in zip(trainers, plans, strict=True)
            if plan is not None
        ]
        weights = averaged(weights, parts)
        if number % 5 == 0 or number > asked.rounds - 3:
            score = judge.evaluate(weights)
            assert score is not None
            yield {"round": number, **score.metrics}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fleet", action="append", choices=list(fleets()), help="without: all")
    parser.add_argument("--seed", type=int, action="append", help="without: 0, 1 and 2")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=40)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with asked.out.open("a") as out:
        for seed in asked.seed or (0, 1, 2):
            for fleet in asked.fleet or fleets():
                begun = time.monotonic()
                for score in run(fleets()[fleet], asked, seed):
                    line = {"fleet": fleet, "seed": seed, **score, "seconds": round(time.monotonic() - begun, 1)}
                    print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    _main()

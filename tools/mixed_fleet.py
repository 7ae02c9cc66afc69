"""A fleet of unequal devices on Fashion-MNIST: what mixed local models cost and bring.

Ten workers hold non-IID parts: four train the whole model, three half of its channels, three a quarter, pruned,
quantized and clustered. Beside it the fleets to hold it against: all whole, all smallest, and the small ones left
out. The aggregation is the aggregator's own, without the network. Parts are Dirichlet(0.5)'s, or `held`: trousers
and bags (labels 1 and 8) are held by the six small devices alone.

`python tools/mixed_fleet.py --out results.jsonl` writes one JSON line for each fleet and seed, and goes on where
it was stopped; `--show results.jsonl` prints the table.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fedgrpc.aggregation.channels import Selection
from fedgrpc.aggregation.compression_plan import Clustering, CompressionPlan, Pruning, Quantization
from fedgrpc.aggregation.coverage import CoordinateMean, Coverage
from fedgrpc.aggregation.packed import pack
from fedgrpc.aggregation.precision import rounding_noise, say
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.tasks.torch_batches import subset_of
from fedgrpc.tasks.torch_trainer import TorchTrainer
from fedgrpc.worker.trainer import TaskSetup, TrainJob, Weights

WORKERS, WHOLE = 10, 4
HELD = (1, 8)
# Accuracy swings from round to round: the mean of so many is what counts.
LAST = 5


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
    # Large devices train the prefixes that the small ones have, too.
    nested = (
        [CompressionPlan(nested=(0.5, 0.25))] * 4 + [CompressionPlan(0.5, nested=(0.25,))] * 3 + small("prefix")
    )
    return {
        "all whole": [whole] * WORKERS,
        **mixed,
        "mixed, nested": nested,
        # The six small devices as wide as the others, of very few bits: what precision weights are for.
        "mixed, 2 bits": [whole] * 4 + [CompressionPlan(quantization=Quantization(2))] * 6,
        "all smallest": [CompressionPlan(0.25)] * WORKERS,
        "small left out": [whole] * 4 + [None] * 6,
    }


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the training, bytes of its tensors, and of the payloads down and up, as int8+zstd."""

    cpu_s: float
    tensor_bytes: int
    download_bytes: int
    upload_bytes: int


@dataclass(frozen=True)
class Trained:
    """One worker's part of a round."""

    delta: Mapping[str, np.ndarray]
    coverage: Mapping[str, Coverage]
    example_count: int
    cost: Cost
    plan: CompressionPlan
    steps: int


def train(
    trainer: TorchTrainer, plan: CompressionPlan, weights: Weights, job: TrainJob, sized: bool = False
) -> Trained:
    """Slice, compress, train; the difference to where the local model started."""
    sub_model = plan.sub_model(job.round)
    selection: Selection = trainer.channels().select(sub_model, weights)
    coverage = {name: selection.coverage(name, array.shape) for name, array in weights.items()}
    given = {name: coverage[name].take(array).copy() for name, array in weights.items()}
    compression = None if plan.plain else plan
    begun = time.process_time()
    result = trainer.train(given, TrainJob(**{**vars(job), "compression": compression}))
    cpu_s = time.process_time() - begun
    start = given if result.start is None else result.start
    delta = {name: array - start[name] for name, array in result.weights.items()}
    sent = {}
    for name, array in delta.items():
        sent |= pack(name, array, result.masks.get(name), name in result.clustered) if sized else {}
    for name, mask in result.masks.items():
        coverage[name] = coverage[name].masked(mask)
        delta[name] = delta[name][mask]
    cost = Cost(cpu_s, result.tensor_bytes, payload_bytes(given) if sized else 0, payload_bytes(sent))
    return Trained(delta, coverage, result.example_count, cost, plan, result.steps)


def payload_bytes(tensors: Weights) -> int:
    """Bytes of the tensors as they travel."""
    if not tensors:
        return 0
    return write_payload(tensors, Recipe.parse("int8+zstd"), io.BytesIO(), np.random.default_rng(0)).size_bytes


def averaged(weights: Weights, parts: Sequence[Trained], precise: bool = False) -> dict[str, np.ndarray]:
    """Each coordinate's mean over those who trained it, added to the model; `precise`: weighed by their noise."""
    new = {}
    for name, array in weights.items():
        mean = CoordinateMean(array.shape)
        for part in parts:
            delta, coverage = part.delta[name], part.coverage[name]
            noise = None
            if precise:
                noise = rounding_noise(part.plan, name, coverage.take(array), part.steps, array.ndim)
            if noise is None:
                mean.add(delta, part.example_count, coverage)
            else:
                mean.add_each(delta, part.example_count * say(noise, delta), coverage)
        new[name] = array if mean.covers_nothing else (array + mean.result()).astype(array.dtype)
    return new


class HeldBySmall(FashionMnist):
    """One worker's part where two labels are held by the six small devices alone, all others by all, evenly."""

    def __init__(self, model: str, number: int, seed: int) -> None:
        super().__init__(model)
        self._number, self._seed = number, seed

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """A tenth of what all hold, and a sixth of the rest."""
        train, _ = super().data(path)
        labels = train.tensors[1].numpy()  # type: ignore[attr-defined]
        order = np.random.default_rng(self._seed).permutation(len(labels))
        rare = np.isin(labels[order], HELD)
        mine = list(order[~rare][self._number :: WORKERS])
        if self._number >= WHOLE:
            mine += list(order[rare][self._number - WHOLE :: WORKERS - WHOLE])
        return subset_of(train, np.array(mine)), None


def trainers_of(asked: argparse.Namespace, seed: int) -> list[TorchTrainer]:
    """Each worker with its part of the data."""
    if asked.partition == "held":
        setup = TaskSetup(device="cpu", seed=seed)
        return [TorchTrainer(HeldBySmall(asked.model, number, seed), setup) for number in range(WORKERS)]
    parts = (f"{number + 1}/{WORKERS}" for number in range(WORKERS))
    setups = (TaskSetup(asked.model, None, "cpu", asked.partition, part, seed) for part in parts)
    return [FashionMnist.build_trainer(setup) for setup in setups]


def run(plans: Sequence[CompressionPlan | None], asked: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores of the global model on all held-out examples, and what the last round cost each worker."""
    trainers = trainers_of(asked, seed)
    judge = FashionMnist.build_trainer(TaskSetup(asked.model, None, "cpu", None, None, seed))
    scores: dict[int, float] = {}
    costs: list[Cost] = []
    weights = judge.initial_weights()
    for number in range(1, asked.rounds + 1):
        job = TrainJob(
            epochs=asked.epochs,
            max_steps=asked.max_steps,
            learning_rate=asked.learning_rate,
            momentum=0.9,
            seed=seed,
            round=number,
        )
        parts = [
            train(trainer, plan, weights, job, sized=number == asked.rounds)
            for trainer, plan in zip(trainers, plans, strict=True)
            if plan is not None
        ]
        weights = averaged(weights, parts, asked.precision_weights)
        if number % 10 == 0 or number > asked.rounds - LAST:
            score = judge.evaluate(weights)
            assert score is not None
            scores[number] = round(100 * score.metrics["accuracy"], 2)
        costs = [part.cost for part in parts]
    return {"accuracy": scores, "costs": [asdict(cost) for cost in costs]}


def show(path: Path) -> None:
    """Mean over the last rounds of each seed, and over the seeds."""
    runs: dict[str, list[float]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        last = [line["accuracy"][number] for number in sorted(line["accuracy"], key=int)][-LAST:]
        weights = "precision weights" if line.get("precision_weights") else "plain weights"
        runs.setdefault(f"{line['partition']} | {line['fleet']} | {weights}", []).append(statistics.fmean(last))
    for name, accuracies in runs.items():
        listed = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        print(f"| {name} | {statistics.fmean(accuracies):.1f} | {listed} |")


def _same(about: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    precise = about.get("precision_weights") == line.get("precision_weights")
    return precise and all(line.get(key) == value for key, value in about.items())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of such a file, and train nothing")
    parser.add_argument("--precision-weights", action="store_true", help="as the aggregator's flag")
    parser.add_argument("--partition", default="dirichlet:0.5", help="or held")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--fleet", action="append", choices=list(fleets()), help="without: all")
    parser.add_argument("--seed", type=int, action="append", help="without: 0, 1 and 2")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=40)
    asked = parser.parse_args()
    if asked.show or not asked.out:
        show(asked.show) if asked.show else parser.error("--out or --show")
        return
    torch.set_num_threads(1)
    done = asked.out.read_text().splitlines() if asked.out.exists() else []
    for seed in asked.seed or (0, 1, 2):
        for fleet in asked.fleet or fleets():
            about = {"fleet": fleet, "seed": seed, "partition": asked.partition, "rounds": asked.rounds}
            about |= {"precision_weights": asked.precision_weights} if asked.precision_weights else {}
            about |= {"max_steps": asked.max_steps, "learning_rate": asked.learning_rate, "model": asked.model}
            if any(_same(about, json.loads(line)) for line in done):
                continue
            begun = time.process_time()
            line = {**about, **run(fleets()[fleet], asked, seed)}
            with asked.out.open("a") as out:
                print(json.dumps({**line, "cpu_s": round(time.process_time() - begun, 1)}), file=out)


if __name__ == "__main__":
    _main()

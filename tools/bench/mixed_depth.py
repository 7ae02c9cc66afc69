"""Fleets of unequal depth beside each other, in one process: blocks with early exits, as in DepthFL (ICLR 2023).

Ten workers on Fashion-MNIST, as in `tools.bench.mixed_rules`: four train all three blocks of `cnn-exits`, three
the first two, three the first one. Rules are ours: mean by examples of each coordinate over those who have it, and
a loss with the labels' own frequencies taken out.

`python -m tools.bench.mixed_depth --out depth.jsonl` writes one JSON line for each run, and continues where it was
stopped; `--show depth.jsonl` prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.torch.models import build_model
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, Weights
from tools.bench.mixed_fleet import LAST, WORKERS
from tools.bench.mixed_rules import Learner, Rules, average, cut

_RULES = Rules(())


def fleets() -> dict[str, Sequence[LocalModelPlan | None]]:
    """The plan of each worker, by fleet; None stays out."""
    whole, two, one = LocalModelPlan(), LocalModelPlan(depth=2), LocalModelPlan(depth=1)
    mixed = [whole] * 4 + [two] * 3 + [one] * 3
    return {
        "all whole": [whole] * WORKERS,
        "mixed": mixed,
        "mixed, distillation 0.5": [replace(plan, distillation=0.5) for plan in mixed],
        "all of depth 2": [two] * WORKERS,
        "all of depth 1": [one] * WORKERS,
        "shallow left out": [whole] * 4 + [None] * 6,
    }


class Deep(Learner):
    """One worker's part of the images, and the network with early exits."""

    def model(self) -> nn.Module:
        return build_model("cnn-exits", num_classes=10, in_channels=1, image_size=28)


class Judge(FashionMnist):
    """Scores the global model on all held-out images."""

    def __init__(self) -> None:
        super().__init__("cnn-exits")


def run(plans: Sequence[LocalModelPlan | None], asked: argparse.Namespace, seed: int) -> list[float]:
    """Accuracy of the global model, in percent, after each of the last rounds."""
    setup = TaskSetup(device="cpu", seed=seed, threads=1)
    here = {number: plan for number, plan in enumerate(plans) if plan is not None}
    trainers = {number: TorchTrainer(Deep(_RULES, asked.partition, number, seed), setup) for number in here}
    judge = TorchTrainer(Judge(), setup)
    channels = judge.channels()
    deepest = 0 if any(not plan.depth for plan in here.values()) else max(plan.depth for plan in here.values())
    weights: Weights = judge.initial_weights()
    scores = []
    for round_number in range(1, asked.rounds + 1):
        results = []
        for number, plan in here.items():
            kept = channels.select(plan.sub_model(round_number))
            given = cut(weights, kept)
            job = TrainJob(
                max_steps=asked.steps,
                batch_size=32,
                learning_rate=asked.learning_rate,
                momentum=0.9,
                label_adjustment=1.0,
                seed=(seed << 16) + (number << 8) + round_number,
                round=round_number,
                local_model=None if plan.plain else plan,
            )
            result = trainers[number].train({name: each.copy() for name, each in given.items()}, job)
            results.append((result, given, float(result.example_count), None, kept))
        weights = average(weights, results)
        if round_number > asked.rounds - LAST:
            # Exits that nobody trains say nothing.
            score = judge.evaluate(cut(weights, channels.select(LocalModelPlan(depth=deepest).sub_model(0))))
            assert score is not None
            scores.append(round(100 * score.metrics["accuracy"], 2))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--fleet", action="append", choices=list(fleets()), help="without: all")
    parser.add_argument("--seed", type=int, action="append", help="without: 0")
    parser.add_argument("--partition", default="dirichlet:0.5")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    asked = parser.parse_args()
    if asked.show:
        lines = [json.loads(text) for text in asked.show.read_text().splitlines()]
        for line in lines:
            accuracy = statistics.fmean(line["accuracy"])
            print(f"| {line['partition']} | {line['fleet']} | {line['seed']} | {accuracy:.1f} |")
        return
    settings = {name: getattr(asked, name) for name in ("partition", "rounds", "steps", "learning_rate")}
    done = [json.loads(text) for text in asked.out.read_text().splitlines()] if asked.out.exists() else []
    for seed in asked.seed or (0,):
        for fleet in asked.fleet or fleets():
            about = {"fleet": fleet, "seed": seed, **settings}
            if any(about.items() <= line.items() for line in done):
                continue
            begun = time.process_time()
            line = about | {"accuracy": run(fleets()[fleet], asked, seed)}
            line["cpu_s"] = round(time.process_time() - begun, 1)
            with asked.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

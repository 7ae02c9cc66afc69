"""Rules for fleets of unequal devices beside each other: ours, HeteroFL's and FedRolex's, in one process.

The devices and fleets are those of `tools.bench.mixed_fleet`: ten workers, four whole, three of half the channels,
three of a quarter. The same trainers train the same local models, and the same `CoordinateMean` averages them.
There is no gRPC, no process and no encoding, so updates travel exactly. The model is a small one, of two hidden
layers of 64 and 32 units: a quarter of it is 16 and 8. So a run costs seconds of one core instead of minutes, and
five seeds of three partitions are possible. What is compared are the rules, which nothing of that changes.

The published rules are for widths alone, as in their papers, and beside them stand ours for widths alone:

    ours         mean by examples, loss with the labels' own frequencies taken out (`LabelAdjustment`, tau = 1)
    HeteroFL     prefixes; mean by devices; logits of absent labels are zero, and their rows are not averaged;
                 each hidden layer is scaled by 1 / width while it trains (arXiv 2010.01264)
    FedRolex     the same with windows that roll on by one channel each round (arXiv 2212.01548)

Both papers normalize each layer, and this model does not: so each rule also runs without its scaling.

"counted as mixed" is the control: every device trains the whole model, and of the smaller ones only the
coordinates count that they have in the mixed fleet. So nothing is narrow, and only the outer channels lack their
examples.

`python -m tools.bench.mixed_rules --out rules.jsonl` writes one JSON line for each run, and continues where it was
stopped; `--show rules.jsonl` prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.submodels.channels import ChannelMap, KeptChannels
from fedgrpc.submodels.coverage import Coverage
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.torch.data import labels_of
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, TrainResult, Weights
from tools.bench.mixed_fleet import LAST, WORKERS, Part, small, trained_part

SEEDS = (0, 1, 2, 3, 4)
PARTITIONS = ("dirichlet:0.5", "labels:3", "held")
HEAD = "fc3"


@dataclass(frozen=True)
class Rules:
    """Plans of the fleet's devices, None for one that stays out, and how they train and are averaged.

    `counted` are plans whose coordinates count of what the devices train; without, all that they train.
    """

    plans: Sequence[LocalModelPlan | None]
    counted: Sequence[LocalModelPlan] = ()
    tau: float = 1.0
    masked: bool = False
    scaled: bool = False
    by_device: bool = False


def fleets() -> dict[str, Rules]:
    """The fleets, in the order in which they are run."""
    whole, half, quarter = LocalModelPlan(), LocalModelPlan(0.5), LocalModelPlan(0.25)
    widths = [whole] * 4 + [half] * 3 + [quarter] * 3
    rolling = [whole] * 4 + [LocalModelPlan(0.5, "rolling")] * 3 + [LocalModelPlan(0.25, "rolling")] * 3
    mixed = [whole] * 4 + [half] * 3 + small("prefix")
    nested = [LocalModelPlan(nested=(0.5, 0.25))] * 4 + [LocalModelPlan(0.5, nested=(0.25,))] * 3 + small("prefix")
    published = partial(Rules, tau=0.0, masked=True, by_device=True)
    return {
        "all whole": Rules([whole] * WORKERS),
        "mixed": Rules(mixed),
        "all smallest": Rules([quarter] * WORKERS),
        "small left out": Rules([whole] * 4 + [None] * 6),
        "widths": Rules(widths),
        "counted as mixed": Rules([whole] * WORKERS, widths),
        "HeteroFL": published(widths, scaled=True),
        "FedRolex": published(rolling, scaled=True),
        "HeteroFL, not scaled": published(widths),
        "FedRolex, not scaled": published(rolling),
        "mixed, rolling": Rules([whole] * 4 + [LocalModelPlan(0.5, "rolling")] * 3 + small("rolling")),
        "mixed, nested": Rules(nested),
        "all smallest, compressed": Rules((small("prefix") * 4)[:WORKERS]),
    }


class Perceptron(nn.Module):
    """784 pixels, 64 and 32 hidden units with ReLU, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 28, 28]."""
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))  # type: ignore[no-any-return]


class Judge(FashionMnist):
    """Scores the global model on all held-out images."""

    def model(self) -> nn.Module:
        """Build the model of the fleets."""
        return Perceptron()


@cache
def _images() -> tuple[Dataset[Any], Dataset[Any] | None]:
    return FashionMnist().data(None)


@cache
def _judge() -> tuple[TorchTrainer, ChannelMap]:
    judge = TorchTrainer(Judge(), TaskSetup(device="cpu"))
    return judge, judge.channels()


class Learner(Part):
    """One worker's part, with the loss and the layers of a published rule where it has them."""

    def __init__(self, rules: Rules, partition: str, number: int, seed: int) -> None:
        self._rules = rules
        self._absent: Tensor | None = None
        super().__init__("lenet", partition, number, seed)

    def model(self) -> nn.Module:
        """Build the model, with a scaler after each hidden layer where the rule has it."""
        model = Perceptron()
        for name, layer in model.named_children() if self._rules.scaled else ():
            if name != HEAD:
                layer.register_forward_hook(partial(_scaled, len(layer.weight)))  # type: ignore[arg-type]
        return model

    def whole_data(self) -> Dataset[Any]:
        """All training images, read once for all workers."""
        return _images()[0]

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """This worker's part; and the labels that it lacks, for the masked loss."""
        mine, held_out = super().data(path)
        self._absent = torch.from_numpy(np.bincount(labels_of(mine), minlength=10) == 0)
        return mine, held_out

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy; masked: the logit of a label that the worker lacks is zero."""
        if self._rules.masked and self._absent is not None:
            outputs = outputs.masked_fill(self._absent, 0.0)
        return functional.cross_entropy(outputs, targets)

    def trained_rows(self) -> np.ndarray | None:
        """The rows of the output layer that count, as bool; None: all."""
        return None if not self._rules.masked or self._absent is None else ~self._absent.numpy()


def _scaled(channels: int, layer: Any, inputs: Any, outputs: Tensor) -> Tensor | None:
    """Divide by the width that is trained; the whole model is scored as it is."""
    return outputs * (channels / len(layer.weight)) if layer.training else None


def average(
    weights: Weights, results: Sequence[tuple[TrainResult, Weights, float, np.ndarray | None, Any]]
) -> dict[str, np.ndarray]:
    """The next version: each coordinate moves by the mean of those who trained it."""
    moved = {}
    for name, values in weights.items():
        mean = CoordinateMean(values.shape)
        for result, given, weight, rows, selection in results:
            if not selection.has(name):
                continue
            coverage: Coverage = selection.coverage(name, values.shape)
            start = given if result.start is None else result.start
            delta, mask = result.weights[name] - start[name], result.masks.get(name)
            if rows is not None and name.startswith(HEAD):
                mask = np.broadcast_to(rows.reshape(-1, *(1,) * (delta.ndim - 1)), delta.shape).copy()
            if mask is not None:
                coverage, delta = coverage.masked(mask), delta[mask]
            mean.add(delta, weight, coverage)
        moved[name] = values if mean.covers_nothing else (values + mean.result()).astype(values.dtype)
    return moved


def cut(weights: Weights, kept: KeptChannels) -> dict[str, np.ndarray]:
    """The tensors of a sub-model."""
    return {
        name: kept.coverage(name, its.shape).take(its).copy() for name, its in weights.items() if kept.has(name)
    }


def run(rules: Rules, asked: argparse.Namespace, partition: str, seed: int) -> list[float]:
    """Accuracy of the global model, in percent, after each of the last rounds."""
    setup = TaskSetup(device="cpu", seed=seed, threads=1)
    plans = [(number, plan) for number, plan in enumerate(rules.plans) if plan is not None]
    learners = {number: Learner(rules, partition, number, seed) for number, _ in plans}
    trainers = {number: TorchTrainer(learner, setup) for number, learner in learners.items()}
    judge, channels = _judge()
    weights: Weights = trainers[0].initial_weights()
    scores = []
    for round_number in range(1, asked.rounds + 1):
        results = []
        for number, plan in plans:
            selection = channels.select(plan.sub_model(round_number))
            given = cut(weights, selection)
            job = TrainJob(
                max_steps=asked.steps,
                batch_size=asked.batch_size,
                learning_rate=asked.learning_rate,
                momentum=0.9,
                label_adjustment=rules.tau,
                seed=(seed << 16) + (number << 8) + round_number,
                round=round_number,
                local_model=None if plan.plain else plan,
            )
            result = trainers[number].train({name: its.copy() for name, its in given.items()}, job)
            if rules.counted:
                selection = channels.select(rules.counted[number].sub_model(round_number))
                result = replace(result, weights=cut(result.weights, selection))
                given = cut(given, selection)
            weight = 1.0 if rules.by_device else float(result.example_count)
            results.append((result, given, weight, learners[number].trained_rows(), selection))
        weights = average(weights, results)
        if round_number > asked.rounds - LAST:
            score = judge.evaluate(trained_part(weights, channels, [plan for _, plan in plans]))
            assert score is not None
            scores.append(round(100 * score.metrics["accuracy"], 2))
    return scores


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Mean over the last rounds of each seed, by partition and fleet."""
    for partition in dict.fromkeys(line["partition"] for line in lines):
        print(f"\n{partition}\n\n| fleet | mean | seeds {', '.join(map(str, SEEDS))} |\n| --- | --- | --- |")
        found = {
            (line["fleet"], line["seed"]): statistics.fmean(line["accuracy"])
            for line in lines
            if line["partition"] == partition
        }
        for fleet in fleets():
            each = [found.get((fleet, seed)) for seed in SEEDS]
            known = [one for one in each if one is not None]
            if known:
                listed = ", ".join("-" if one is None else f"{one:.1f}" for one in each)
                print(f"| {fleet} | {statistics.fmean(known):.1f} | {listed} |")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of such a file, and train nothing")
    parser.add_argument("--fleet", action="append", choices=list(fleets()), help="without: all")
    parser.add_argument("--seed", type=int, action="append", help="without: 0 to 4")
    parser.add_argument("--partition", action="append", help=f"without: {', '.join(PARTITIONS)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    asked = parser.parse_args()
    if asked.show or not asked.out:
        if not asked.show:
            parser.error("--out or --show")
        show([json.loads(text) for text in asked.show.read_text().splitlines()])
        return
    settings = {name: getattr(asked, name) for name in ("rounds", "steps", "batch_size", "learning_rate")}
    done = [json.loads(text) for text in asked.out.read_text().splitlines()] if asked.out.exists() else []
    for seed in asked.seed or SEEDS:
        for partition in asked.partition or PARTITIONS:
            for fleet in asked.fleet or fleets():
                about = {"fleet": fleet, "seed": seed, "partition": partition, **settings}
                if any(about.items() <= line.items() for line in done):
                    continue
                begun = time.process_time()
                accuracy = run(fleets()[fleet], asked, partition, seed)
                line = about | {"accuracy": accuracy, "cpu_s": round(time.process_time() - begun, 1)}
                with asked.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    _main()

"""A fleet of unequal devices on Fashion-MNIST: what mixed local models cost and bring.

Ten workers hold non-IID parts: four train the whole model, three half of its channels, three a quarter, pruned,
quantized and clustered. Beside it the fleets to hold it against: all whole; all as the smallest are, compressed
or just a quarter; and the small ones left out. A fleet in which nobody trains the whole model is scored by the
slice it trains. An aggregator and its workers run in this process and talk gRPC; one worker trains at a time,
so that its CPU time is its own. Parts are Dirichlet(0.5)'s, or `held`: trousers and bags (labels 1 and 8) are
held by the six small devices alone.

`python -m tools.bench.mixed_fleet --out results.jsonl` writes one JSON line for each fleet and seed, and
continues where it was stopped; `--show results.jsonl` prints the tables, with `--plot figure.png` it draws them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from safetensors.numpy import load_file
from torch.utils.data import Dataset

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.plots import TEXT_PT, new_figure, save, styles
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.storage.run_store import RoundRecord, RunStore
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import Clustering, LocalModelPlan, Pruning, Quantization
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.torch.data import labels_of, subset_of
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import EvalResult, TaskSetup, TrainJob, TrainResult, Weights
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN, TASK_PHASE_ACCEPTED
from fedgrpc.worker.process import Worker
from fedgrpc.worker.settings import WorkerSettings

WORKERS, WHOLE = 10, 4
HELD = (1, 8)
# Accuracy swings from round to round: the mean of so many is what counts.
LAST = 5
EVERY = 3
COMPARED = ("all whole", "mixed, prefix", "all smallest, compressed", "all smallest", "small left out")


def small(rule: str) -> list[LocalModelPlan]:
    """What the three smallest devices do besides training a quarter of the channels."""
    return [
        LocalModelPlan(0.25, rule, pruning=Pruning(0.3)),
        LocalModelPlan(0.25, rule, quantization=Quantization(8, 8)),
        LocalModelPlan(0.25, rule, clustering=Clustering(32, ("fc*",))),
    ]


def fleets() -> dict[str, Sequence[LocalModelPlan | None]]:
    """The plan of each worker, by fleet; None stays out."""
    whole, half, quarter = LocalModelPlan(), LocalModelPlan(0.5), LocalModelPlan(0.25)
    mixed = {
        f"mixed, {rule}": [whole] * 4 + [LocalModelPlan(0.5, rule)] * 3 + small(rule)
        for rule in ("prefix", "rolling")
    }
    # Large devices train the prefixes that the small ones have, too.
    nested = [LocalModelPlan(nested=(0.5, 0.25))] * 4 + [LocalModelPlan(0.5, nested=(0.25,))] * 3 + small("prefix")
    # One technique at a time: what each of them costs.
    alone = {
        "widths alone": [whole] * 4 + [half] * 3 + [quarter] * 3,
        "pruning alone": [whole] * 7 + [LocalModelPlan(pruning=Pruning(0.3))] * 3,
        "quantization alone": [whole] * 7 + [LocalModelPlan(quantization=Quantization(8, 8))] * 3,
        "clustering alone": [whole] * 7 + [LocalModelPlan(clustering=Clustering(32, ("fc*",)))] * 3,
    }
    return {
        "all whole": [whole] * WORKERS,
        **mixed,
        "mixed, nested": nested,
        **alone,
        "all half": [half] * WORKERS,
        "all smallest": [quarter] * WORKERS,
        # As the small devices of the mixed fleet really are.
        "all smallest, compressed": (small("prefix") * 4)[:WORKERS],
        "small left out": [whole] * 4 + [None] * 6,
    }


class Part(FashionMnist):
    """One worker's examples. Scores are the judge's, so there are none to score with."""

    def __init__(self, model: str, partition: str, number: int, seed: int) -> None:
        super().__init__(model)
        self._partition, self._number, self._seed = partition, number, seed

    def whole_data(self) -> Dataset[Any]:
        """All training images."""
        return super().data(None)[0]

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """This worker's part of the training images."""
        train = self.whole_data()
        labels = labels_of(train)
        if self._partition != "held":
            mine = parse_partition(self._partition).split(labels, WORKERS, self._seed)[self._number]
            return subset_of(train, mine), None
        order = np.random.default_rng(self._seed).permutation(len(labels))
        rare = np.isin(labels[order], HELD)
        held = list(order[~rare][self._number :: WORKERS])
        if self._number >= WHOLE:
            held += list(order[rare][self._number - WHOLE :: WORKERS - WHOLE])
        return subset_of(train, np.array(held)), None


class Timed:
    """A trainer that trains while no other does, and counts the CPU seconds of that."""

    def __init__(self, inner: TorchTrainer, one_at_a_time: threading.Lock) -> None:
        self._inner = inner
        self._lock = one_at_a_time
        self.cpu_s: list[float] = []

    def initial_weights(self) -> Weights:
        return self._inner.initial_weights()

    def channels(self) -> ChannelMap:
        with self._lock:
            return self._inner.channels()

    def evaluate(self, weights: Weights) -> EvalResult | None:
        return None

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        with self._lock:
            begun = time.thread_time()
            result = self._inner.train(weights, job)
            self.cpu_s.append(time.thread_time() - begun)
        return result


async def federated(
    folder: Path,
    plans: Mapping[str, LocalModelPlan],
    trainers: Mapping[str, Timed],
    asked: argparse.Namespace,
    seed: int,
) -> list[RoundRecord]:
    """A whole run over gRPC; its training rounds. The versions of the model are left in `folder`."""
    settings = AggregatorSettings(
        folder / "aggregator",
        "127.0.0.1:0",
        rounds=asked.rounds,
        policy=RoundPolicy(min_workers=len(plans), min_sample_size=len(plans), quorum=len(plans), deadline_s=7200),
        plan=TrainingPlan(
            epochs=asked.epochs,
            max_steps=asked.max_steps,
            learning_rate=asked.learning_rate,
            momentum=0.9,
            label_adjustment=asked.label_adjustment,
        ),
        local_models=PlanTable(classes=plans),
        evaluate=False,
        seed=seed,
        keep_versions=asked.rounds + 1,
    )
    serving: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    aggregator = Aggregator(settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(aggregator.run(serving.set_result))
        address = f"127.0.0.1:{await serving}"
        for name, trainer in trainers.items():
            about = WorkerSettings(name, address, folder / name, serve_address=None, device={"device_class": name})
            group.create_task(Worker(about, lambda _, trainer=trainer: trainer).run())  # type: ignore[misc]
    store = RunStore(folder / "aggregator" / "run.sqlite")
    try:
        records, _ = store.rounds(1 << 40, asked.rounds + 1)
    finally:
        store.close()
    return [record for record in records if record.kind == TASK_KIND_TRAIN]


def run(plans: Sequence[LocalModelPlan | None], asked: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores of the global model on all held-out images, and what the rounds cost each worker."""
    setup, lock = TaskSetup(device="cpu", seed=seed), threading.Lock()
    wanted = {f"worker-{number}": plan for number, plan in enumerate(plans) if plan is not None}
    trainers = {
        name: Timed(TorchTrainer(Part(asked.model, asked.partition, number, seed), setup), lock)
        for number, name in enumerate(wanted)
    }
    judge = FashionMnist.build_trainer(TaskSetup(asked.model, None, "cpu", None, None, seed))
    with tempfile.TemporaryDirectory(prefix="mixed-") as name:
        folder = Path(name)
        records = asyncio.run(federated(folder, wanted, trainers, asked, seed))
        assert len(records) == asked.rounds
        tasks = [task for record in records for task in record.tasks]
        if len(tasks) != asked.rounds * len(wanted) or any(task.phase != TASK_PHASE_ACCEPTED for task in tasks):
            raise SystemExit("not every worker took part in every round")
        scores = {}
        for number in range(1, asked.rounds + 1):
            if number % EVERY == 0 or number > asked.rounds - LAST:
                # Version 1 is the untrained model.
                version = folder / "aggregator" / "models" / f"{number + 1:06d}.safetensors"
                score = judge.evaluate(trained_part(load_file(version), judge.channels(), wanted.values()))
                assert score is not None
                scores[number] = round(100 * score.metrics["accuracy"], 2)
    mine = {name: [task for task in tasks if task.worker == name] for name in wanted}
    costs = [
        {
            "plan": plan.to_toml(),
            "cpu_s": statistics.median(trainers[name].cpu_s),
            "tensor_bytes": statistics.median(task.tensor_bytes for task in mine[name]),
            "download_bytes": statistics.median(task.download_bytes for task in mine[name]),
            "upload_bytes": statistics.median(task.upload_bytes for task in mine[name]),
        }
        for name, plan in wanted.items()
    ]
    return {"accuracy": scores, "costs": costs}


def trained_part(weights: Weights, channels: ChannelMap, plans: Iterable[LocalModelPlan]) -> Weights:
    """What a fleet has of the model: all of it, or the prefix that its widest plan trains.

    The other channels still have their first values, which would only disturb.
    """
    widest = max(plans, key=lambda plan: plan.width)
    selection = channels.select(widest.sub_model(0))
    return {name: selection.coverage(name, its.shape).take(its).copy() for name, its in weights.items()}


def last_mean(line: Mapping[str, Any]) -> float:
    """Mean accuracy after the last rounds."""
    return statistics.fmean([line["accuracy"][number] for number in sorted(line["accuracy"], key=int)][-LAST:])


def kind_of(line: Mapping[str, Any]) -> str:
    """What the lines have in common that differ only in their seed."""
    tau = line["label_adjustment"]
    return f"{line['partition']} | {line['rounds']} rounds | {line['fleet']} | tau {tau:g}"


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Mean over the last rounds of each seed and over the seeds; then what a round cost, by plan."""
    runs: dict[str, list[float]] = {}
    for line in lines:
        runs.setdefault(kind_of(line), []).append(last_mean(line))
    for name, accuracies in runs.items():
        listed = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        print(f"| {name} | {statistics.fmean(accuracies):.1f} | {listed} |")
    costs: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        for cost in line["costs"]:
            costs.setdefault(f"{line['fleet']} | {' '.join(cost['plan'].split()) or 'whole'}", []).append(cost)
    for plan, each in costs.items():
        middle = {name: statistics.median(cost[name] for cost in each) for name in each[0] if name != "plan"}
        cpu_s, *sizes = middle.values()
        print(f"| {plan} | {cpu_s:.3f} | {' | '.join(f'{size:.0f}' for size in sizes)} |")


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy by round: mean of the seeds, one panel for each partition and loss."""
    panels: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        title = f"{line['partition']}, label adjustment {line['label_adjustment']:g}"
        panels.setdefault(title, {}).setdefault(line["fleet"], []).append(line)
    figure, axes = new_figure(len(panels), 4.6 * len(panels), 4.4, sharey=True)
    looks = dict(zip(COMPARED, styles(), strict=False))
    for each, (title, fleet_lines) in zip(axes, sorted(panels.items()), strict=True):
        for fleet, some in fleet_lines.items():
            rounds = sorted(map(int, some[0]["accuracy"]))
            means = [statistics.fmean(line["accuracy"][str(number)] for line in some) for number in rounds]
            colour, marker = looks[fleet]
            each.plot(
                rounds, means, label=f"{fleet} ({len(some)} seeds)", color=colour, marker=marker, markevery=4
            )
        each.set(title=title, xlabel="round")
        each.legend(loc="lower right", fontsize=TEXT_PT)
    axes[0].set(ylabel="accuracy of the global model, %", ylim=(40, 90))
    save(figure, path)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and train nothing")
    parser.add_argument("--plot", type=Path, help="with --show: draw the accuracies there")
    parser.add_argument("--label-adjustment", type=float, default=1.0, help="as the aggregator's flag")
    parser.add_argument("--partition", default="dirichlet:0.5", help="or held")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--fleet", action="append", choices=list(fleets()), help=f"without: {', '.join(COMPARED)}")
    parser.add_argument("--seed", type=int, action="append", help="without: 0, 1 and 2")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=20)
    asked = parser.parse_args()
    if asked.show or not asked.out:
        if not asked.show:
            parser.error("--out or --show")
        show(_lines(asked.show))
        if asked.plot:
            plot(_lines(asked.show), asked.plot)
        return
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    told = ("partition", "rounds", "max_steps", "learning_rate", "model", "label_adjustment")
    for seed in asked.seed or (0, 1, 2):
        for fleet in asked.fleet or COMPARED:
            about = {"fleet": fleet, "seed": seed, **{name: getattr(asked, name) for name in told}}
            if any(about.items() <= line.items() for line in map(_flat, _lines(asked.out))):
                continue
            begun = time.process_time()
            line = {**about, **run(fleets()[fleet], asked, seed)}
            with asked.out.open("a") as out:
                print(json.dumps({**line, "cpu_s": round(time.process_time() - begun, 1)}), file=out)


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("accuracy", "costs")}


if __name__ == "__main__":
    _main()

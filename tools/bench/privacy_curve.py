"""Accuracy against epsilon: Fashion-MNIST on hundreds of devices, through the learning simulator.

    python -m tools.bench.privacy_curve --out privacy.jsonl
    python -m tools.bench.privacy_curve --show privacy.jsonl [--plot docs/images/privacy.png]

The simulator plays the production aggregator: its selection, its ledger, its noise and its commits. Each run is a
line of the file, and a command that was stopped continues where it was. Softmax regression on images of 14 x 14.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.aggregator.private_releases import KEY_FILE
from fedgrpc.cli.experiment import parse_experiment
from fedgrpc.cli.privacy import stored
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import parse_part, parse_partition
from fedgrpc.logging import configure
from fedgrpc.simulation.learning.play import play
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights
from tools.pictures import draw_privacy

DEVICES, COHORT, ROUNDS, SEPARATION = 600, 50, 20, 10
DELTA, CLIP, STEPS, RATE = 1e-4, 0.5, 3, 1.0
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
PLAIN, ADAPTIVE = "without noise", "quantile 0.5"

WAYS: Mapping[str, Mapping[str, Any]] = {
    "gaussian, any choice": {"privacy": "gaussian"},
    f"gaussian, once in {SEPARATION} versions": {"privacy": "gaussian", "min_separation": SEPARATION},
    "gaussian, Poisson sample 1/12": {"privacy": "gaussian", "poisson_rate": COHORT / DEVICES, "quorum": 0},
    f"dp-ftrl, once in {SEPARATION} versions": {"privacy": "dp-ftrl", "min_separation": SEPARATION},
    f"dp-mf, once in {SEPARATION} versions": {"privacy": "dp-mf", "min_separation": SEPARATION},
}
# Clip norms that are too small, right and too large for this model: fixed, and as the first of adaptive ones.
CLIPS, CLIP_WAY, CLIP_EPSILON = (0.02, 0.5, 10.0), "gaussian, Poisson sample 1/12", 2.0


@dataclass(frozen=True)
class Run:
    """One simulation: a way to release versions, at which epsilon, with which clip norm."""

    way: str
    epsilon: float
    clip_norm: float
    adaptive: bool
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the aggregator."""
        settings = {
            **{"rounds": ROUNDS, "epochs": STEPS, "batch_size": 1 << 16, "learning_rate": RATE},
            **{"clip_norm": self.clip_norm, "evaluate": False, "encoding": "raw", "seed": self.seed},
            **{"min_workers": COHORT, "max_participants": COHORT, "quorum": COHORT, "deadline": "60s"},
        }
        if self.way != PLAIN:
            settings |= {"target_epsilon": self.epsilon, "delta": DELTA, "privacy_cohort": COHORT}
            settings |= WAYS[self.way]
        if "poisson_rate" in settings:
            del settings["max_participants"]
        return settings | ({"clip_quantile": 0.5} if self.adaptive else {})


@lru_cache(maxsize=1)
def _images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = load_fashion_mnist()

    def prepared(images: np.ndarray) -> np.ndarray:
        small = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196).astype(np.float32) / 255
        # A last one that is always 1: the bias.
        return np.concatenate([small - small.mean(1, keepdims=True), np.ones((len(small), 1), np.float32)], 1)

    held_out = data.held_out
    return prepared(data.train.inputs), data.train.labels, prepared(held_out.inputs), held_out.labels


@lru_cache(maxsize=4)
def _parts(partition: str, parts: int, seed: int) -> list[np.ndarray]:
    return parse_partition(partition).split(_images()[1], parts, seed)


class Softmax:
    """Softmax regression of one device, a full-batch step for each epoch."""

    def __init__(self, partition: str = "iid", part: str = "1/1", seed: int = 0) -> None:
        """Take this part of the images."""
        own, parts = parse_part(part)
        x, y, *_ = _images()
        mine = _parts(partition, parts, seed)[own]
        self._x, self._y = x[mine], np.eye(10, dtype=np.float32)[y[mine]]

    def initial_weights(self) -> Weights:
        """Return zeros."""
        return {"w": np.zeros((197, 10), np.float32)}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Take the steps."""
        w, steps = weights["w"].copy(), 0
        for _ in job.batches(len(self._x), len(self._x)):
            w -= np.float32(RATE) * self._x.T @ (_probabilities(self._x @ w) - self._y) / len(self._x)
            steps += 1
        return TrainResult({"w": w}, len(self._x), steps)

    def evaluate(self, weights: Weights) -> EvalResult:
        """Score on all held-out images."""
        _, _, x, y = _images()
        right = (x @ weights["w"]).argmax(axis=1) == y
        return EvalResult(len(y), {"accuracy": float(right.mean())})


def _probabilities(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def simulated(run: Run) -> dict[str, Any]:
    """Play a run; return its last accuracy, and what the ledger says of it."""
    experiment = parse_experiment(
        {
            "learning": {
                "task": "tools.bench.privacy_curve:Softmax",
                "partition": "iid",
                "evaluate_every": ROUNDS,
            },
            "aggregator": run.settings,
            "devices": [
                {"name": "device", "count": DEVICES, "examples_per_s": 1000.0, "up_mbit": 20.0, "down_mbit": 20.0}
            ],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        # The key of a run is drawn by chance: this one is the seed's, so that the same run gives the same figures.
        (out / "run").mkdir()
        (out / "run" / KEY_FILE).write_bytes(hashlib.sha256(repr(run).encode()).digest())
        rows = play(experiment, out, seed=run.seed, engine="inline")
        found: dict[str, Any] = {"accuracy": rows[-1].score, "updates": sum(row.updates for row in rows)}
        if run.way != PLAIN:
            ledger = stored(out / "run").ledger
            assert ledger.epsilon() <= run.epsilon
            found |= {"releases": len(ledger.releases), "spent": round(ledger.epsilon(), 6)}
            found |= {"noise_multiplier": ledger.rules.noise_multiplier, "last_clip_norm": ledger.rules.clip_norm}
    return found


def runs(seeds: int) -> Iterator[Run]:
    """All runs: the curves, a seed of each after the other, then clip norms."""
    for seed in range(seeds):
        yield Run(PLAIN, 0.0, CLIP, False, seed)
        for epsilon in EPSILONS:
            for way in WAYS:
                yield Run(way, epsilon, CLIP, False, seed)
    for seed in range(seeds):
        for clip_norm in CLIPS:
            for adaptive in (False, True):
                yield Run(CLIP_WAY, CLIP_EPSILON, clip_norm, adaptive, seed)


def found_of(lines: Sequence[Mapping[str, Any]], name: str, **about: Any) -> list[float]:
    """Return a value of all runs like this."""
    return [line[name] for line in lines if about.items() <= line.items()]


def _told(accuracies: Sequence[float]) -> str:
    """Return a cell: the mean, and the deviation of several seeds."""
    if len(accuracies) < 2:
        return "".join(f"{each:.3f}" for each in accuracies)
    return f"{np.mean(accuracies):.3f} ± {np.std(accuracies):.3f}"


def show(lines: Sequence[Mapping[str, Any]], plot: Path | None) -> None:
    """Print the tables, and draw the first."""
    plain = found_of(lines, "accuracy", way=PLAIN)
    print(f"Clipped and without noise: {np.mean(plain):.3f}, {len(plain)} seeds\n")
    print("| epsilon | " + " | ".join(f"{epsilon:g}" for epsilon in EPSILONS) + " |")
    print("| --- |" + " --: |" * len(EPSILONS))
    curves = {}
    for way in WAYS:
        each = [found_of(lines, "accuracy", way=way, epsilon=e, clip_norm=CLIP, adaptive=False) for e in EPSILONS]
        curves[way] = [(e, float(np.mean(a)), float(np.std(a))) for e, a in zip(EPSILONS, each, strict=True) if a]
        print(f"| {way} | " + " | ".join(_told(accuracies) for accuracies in each) + " |")
    print("\n| first clip norm | fixed | by the quantile | last clip norm |\n| --- | --: | --: | --: |")
    for clip_norm in CLIPS:
        about = {"way": CLIP_WAY, "epsilon": CLIP_EPSILON, "clip_norm": clip_norm}
        fixed, moved = (found_of(lines, "accuracy", **about, adaptive=which) for which in (False, True))
        last = found_of(lines, "last_clip_norm", **about, adaptive=True)
        print(f"| {clip_norm:g} | {np.mean(fixed):.3f} | {np.mean(moved):.3f} | {np.mean(last):.2g} |")
    if plot is not None:
        draw_privacy(curves, float(np.mean(plain)), DELTA, plot)


def main() -> None:
    """Play what is missing, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of one JSON line per run")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and play nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.show:
        show([json.loads(text) for text in asked.show.read_text().splitlines()], asked.plot)
        return
    if not asked.out:
        parser.error("--out or --show")
    configure("error")
    lines = [json.loads(text) for text in asked.out.read_text().splitlines()] if asked.out.exists() else []
    for run in runs(asked.seeds):
        if any(asdict(run).items() <= line.items() for line in lines):
            continue
        begun = time.process_time()
        line = asdict(run) | simulated(run) | {"cpu_s": round(time.process_time() - begun, 1)}
        lines.append(line)
        with asked.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""Accuracy over bytes for every encoding, on Fashion-MNIST shared out to ten workers by Dirichlet(0.5).

Each round every worker starts from the model it holds, trains, and sends its difference through the real codec
(payload, zstd, digest and all); the aggregator's mean is fedgrpc's own. Workers are simulated one after another in
one process, since sixty runs over sockets would take days and change no byte. Downlink recipes send the difference
to what the workers hold, and the aggregator remembers exactly that (arXiv 1905.05957). The learning rate falls to
nothing along a cosine, so that the last scores differ by the encoding more than by chance.

    python -m tools.bench.encodings --seeds 3 --rounds 60 --json results.json --plot results.png
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedgrpc.aggregation.mean import mean_of
from fedgrpc.codec.feedback import Residual, write_with_feedback
from fedgrpc.codec.payload import PayloadReader, buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import Dirichlet
from tools.pictures import draw_encodings

Weights = dict[str, np.ndarray]
WORKERS = 10
TARGET = 0.85
EVALUATE_EVERY = 2
LAST_SCORES = 5


@dataclass(frozen=True)
class Case:
    """How updates and models travel; `down` None: the whole model, float32."""

    name: str
    up: str
    feedback: bool = False
    down: str | None = None


LOSSY = (
    "float16",
    "int8+zstd",
    "int4+zstd",
    "int2:rounding=nearest+zstd",
    "rotated4+zstd",
    "rotated2+zstd",
    "rotated1+zstd",
    "topk:fraction=0.01+zstd",
    "topk:fraction=0.05+zstd",
    "threshold:times=3+zstd",
    "entropy:c=3+zstd",
    "entropy:c=5+zstd",
    "entropy:c=8+zstd",
    "entropy:c=2,rounding=nearest+zstd",
)
BOTH_WAYS = (
    ("int8+zstd", "int8+zstd", True),
    ("int4+zstd", "int8+zstd", True),
    ("entropy:c=5+zstd", "int8+zstd", False),
    ("entropy:c=5+zstd", "int4+zstd", False),
    ("entropy:c=5+zstd", "entropy:c=1+zstd", False),
    ("entropy:c=5+zstd", "entropy:c=2+zstd", False),
    ("entropy:c=8+zstd", "entropy:c=3+zstd", False),
    ("entropy:c=8+zstd", "entropy:c=1.9+zstd", False),
    ("entropy:c=8+zstd", "entropy:c=3,rounding=nearest+zstd", False),
)


def cases() -> list[Case]:
    """Every encoding up, with and without error feedback where the codec keeps a residual; then both ways."""
    found = [Case("float32", "raw"), Case("float32 shuffled", "raw+zstd")]
    for recipe in LOSSY:
        found.append(Case(recipe, recipe))
        if Recipe.parse(recipe).default.contractive:
            found.append(Case(f"{recipe} EF", recipe, feedback=True))
    found += [
        Case(f"{up}{' EF' if feedback else ''} / {down}", up, feedback, down) for up, down, feedback in BOTH_WAYS
    ]
    return found


class Cnn(nn.Module):
    """Two strided convolutions and a wide layer: 410,882 parameters, cheap to train."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 5, stride=2, padding=2)
        self.fc1 = nn.Linear(784, 512)
        self.fc2 = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class Fleet:
    """Ten workers with their shares, and the held-out set; the same for every case of one seed."""

    def __init__(self, seed: int, steps: int, batch: int, learning_rate: float) -> None:
        data = load_fashion_mnist()
        self.steps, self.batch, self.learning_rate = steps, batch, learning_rate
        self.parts = [torch.from_numpy(p) for p in Dirichlet(0.5).split(data.train.labels, WORKERS, seed)]
        self.train = _tensors(data.train.inputs, data.train.labels)
        self.test = _tensors(data.held_out.inputs, data.held_out.labels)
        torch.manual_seed(seed)
        self.net = Cnn().to(memory_format=torch.channels_last)
        self.initial = {name: value.numpy().copy() for name, value in self.net.state_dict().items()}

    def local(self, weights: Weights, worker: int, seed: int, decay: float) -> Weights:
        """What `worker` makes of `weights`, with the learning rate times `decay`."""
        self._load(weights)
        self.net.train()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.learning_rate * decay, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        part = self.parts[worker]
        images, labels = self.train
        for _ in range(self.steps):
            index = part[torch.randint(len(part), (self.batch,), generator=generator)]
            optimizer.zero_grad()
            functional.cross_entropy(self.net(images[index]), labels[index]).backward()
            optimizer.step()
        return {name: value.numpy().copy() for name, value in self.net.state_dict().items()}

    @torch.no_grad()
    def accuracy(self, weights: Weights) -> float:
        """Of `weights` on the held-out set."""
        self._load(weights)
        self.net.eval()
        images, labels = self.test
        hits = [self.net(images[i : i + 500]).argmax(1) == labels[i : i + 500] for i in range(0, len(labels), 500)]
        return float(torch.cat(hits).float().mean())

    def _load(self, weights: Weights) -> None:
        self.net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})


def _tensors(inputs: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(inputs.copy()).float().reshape(-1, 1, 28, 28)
    images = images / 255 if images.max() > 1.5 else images
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).long()


def send(
    tensors: Mapping[str, np.ndarray], recipe: Recipe, residual: Residual | None, seed: int
) -> tuple[Weights, int, Residual | None]:
    """(what arrives, its bytes on the wire, the residual left behind)."""
    out, rng = io.BytesIO(), np.random.default_rng(seed)
    if residual is None:
        manifest = write_payload(tensors, recipe, out, rng)
    else:
        manifest, residual = write_with_feedback(tensors, residual, recipe, out, rng)
    reader = PayloadReader(manifest, buffer_reader(out.getvalue()))
    return {spec.name: array for spec, array in reader}, manifest.size_bytes, residual


def run(case: Case, fleet: Fleet, rounds: int, seed: int) -> dict[str, object]:
    """One federation of `rounds` rounds."""
    up, down = Recipe.parse(case.up), None if case.down is None else Recipe.parse(case.down)
    model, held = dict(fleet.initial), dict(fleet.initial)
    residuals: list[Residual | None] = [Residual() if case.feedback else None for _ in range(WORKERS)]
    up_bytes = down_bytes = 0
    curve: list[tuple[int, int, float]] = []
    for number in range(rounds):
        decay = 0.5 * (1 + math.cos(math.pi * number / rounds))
        if down is None:
            held, size = model, WORKERS * sum(value.nbytes for value in model.values())
        else:
            step, size, _ = send({k: model[k] - held[k] for k in model}, down, None, 1000 * seed + number)
            held = {name: held[name] + step[name] for name in held}
            size *= WORKERS
        down_bytes += size
        arrived = []
        for worker in range(WORKERS):
            draw = (seed * 1000 + number) * WORKERS + worker
            trained = fleet.local(held, worker, draw, decay)
            delta = {name: trained[name] - held[name] for name in held}
            update, size, residuals[worker] = send(delta, up, residuals[worker], draw)
            up_bytes += size
            arrived.append((update, float(len(fleet.parts[worker]))))
        model = {
            name: (held[name] + mean_of(((u[name], w) for u, w in arrived), held[name].shape)).astype(np.float32)
            for name in held
        }
        if number % EVALUATE_EVERY == EVALUATE_EVERY - 1:
            curve.append((up_bytes, down_bytes, fleet.accuracy(model)))
    return {"case": asdict(case), "seed": seed, "curve": curve}


def summary(results: list[dict]) -> list[dict[str, object]]:
    """One row a case: medians over the seeds."""
    rows = []
    names = list(dict.fromkeys(result["case"]["name"] for result in results))
    for name in names:
        curves = [result["curve"] for result in results if result["case"]["name"] == name]
        rounds = len(curves[0]) * EVALUATE_EVERY
        reached = [next((i for i, point in enumerate(c) if point[2] >= TARGET), None) for c in curves]
        row: dict[str, object] = {
            "name": name,
            "seeds": len(curves),
            "accuracy": statistics.mean(statistics.mean(p[2] for p in c[-LAST_SCORES:]) for c in curves),
            "up_per_round": statistics.median(c[-1][0] / rounds for c in curves),
            "down_per_round": statistics.median(c[-1][1] / rounds for c in curves),
            "rounds_to_target": None,
            "bytes_to_target": None,
        }
        if None not in reached:
            row["rounds_to_target"] = EVALUATE_EVERY * statistics.median(i + 1 for i in reached)
            points = [curve[i] for curve, i in zip(curves, reached, strict=True)]
            row["bytes_to_target"] = statistics.median(up + down for up, down, _ in points)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown, with bytes also as parts of float32's."""
    base = rows[0]
    lines = [
        "| encoding (up / down) | accuracy | to float32 | up MB/round (fewer) | both (fewer) "
        f"| rounds to {TARGET:.0%} | MB to it |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        both = row["up_per_round"] + row["down_per_round"]
        fewer_up = base["up_per_round"] / row["up_per_round"]
        fewer = (base["up_per_round"] + base["down_per_round"]) / both
        reached = row["rounds_to_target"]
        lines.append(
            f"| {row['name']} | {row['accuracy']:.2%} | {100 * (row['accuracy'] - base['accuracy']):+.2f} "
            f"| {row['up_per_round'] / 1e6:.3f} ({fewer_up:.1f}x) | {both / 1e6:.2f} ({fewer:.1f}x) "
            f"| {'-' if reached is None else f'{reached:g}'} "
            f"| {'-' if reached is None else format(row['bytes_to_target'] / 1e6, '.1f')} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw final accuracy over bytes a round."""
    mb = 1e6
    draw_encodings(
        [
            (
                row["name"],
                row["up_per_round"] / mb,
                (row["up_per_round"] + row["down_per_round"]) / mb,
                100 * row["accuracy"],
            )
            for row in rows
        ],
        path,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=20, help="local steps of a worker in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--only", help="cases whose name has this in it (and float32)")
    parser.add_argument("--json", type=Path, default=Path("runs/encodings.json"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [c for c in cases() if not arguments.only or arguments.only in c.name or c.name == "float32"]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict] = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    done = {(result["case"]["name"], result["seed"]) for result in results}
    for seed in range(arguments.seeds):
        fleet = Fleet(seed, arguments.steps, arguments.batch, arguments.learning_rate)
        for case in chosen:
            if (case.name, seed) in done:
                continue
            begun = time.monotonic()
            results.append(run(case, fleet, arguments.rounds, seed))
            accuracy = results[-1]["curve"][-1][2]
            print(f"seed {seed} {case.name}: {accuracy:.4f} in {time.monotonic() - begun:.0f} s", flush=True)
            arguments.json.write_text(json.dumps(results))
    rows = summary(results)
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()

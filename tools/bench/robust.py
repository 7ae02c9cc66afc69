"""Accuracy of every aggregation rule under attack: a small network on Fashion-MNIST, in NumPy.

    python -m tools.bench.robust --out robust.jsonl            20 workers, 0, 10 and 20 % attackers
    python -m tools.bench.robust --out robust.jsonl --workers 50
    python -m tools.bench.robust --out robust.jsonl --mixed    a third each of whole, narrow and int8 workers
    python -m tools.bench.robust --show robust.jsonl           the tables

Each run is a line of the file, and a command that was stopped continues where it was. The updates of a round are
arrays, and the rules those of `fedgrpc.aggregation.robust`. So it measures the rules, not the transport. Attacks:
sign flip, scaled (by -10), label flip, ALIE (arXiv 1902.06156), inner product (arXiv 1903.03936). An attacker
knows what all honest workers send.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

from fedgrpc.aggregation.robust.aggregation import aggregation_of
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.uniform import Uniform
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import parse_partition

INPUTS, HIDDEN, CLASSES = 196, 64, 10
STEPS, BATCH, RATE = 20, 64, 0.1
ATTACKS = ("sign", "scaled", "labels", "alie", "inner")
RULES = (
    *("mean", "median", "trimmed-mean:0.2", "geometric-median", "krum:f={f}", "multi-krum:f={f}", "centered-clip"),
    *("nnm:f={f}+median", "nnm:f={f}+trimmed-mean:0.2"),
)
# Those that work per coordinate on the updates that have it.
PARTIAL_RULES = RULES[:3]
SHAPES = ((INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


@dataclass(frozen=True)
class Images:
    """Images [N, 196] and labels, of devices together; and those held out."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class Block:
    """Coordinates of the model that the same workers train."""

    workers: np.ndarray
    coordinates: np.ndarray


@dataclass(frozen=True)
class Cell:
    """One run."""

    workers: int
    mixed: bool
    partition: str
    share: float
    attack: str
    rule: str
    seed: int
    rounds: int

    @property
    def attackers(self) -> int:
        return round(self.share * self.workers)


def load() -> Images:
    """A third of the training images and half of those held out, at 14 x 14 pixels."""
    data = load_fashion_mnist(None)

    def flat(examples: Any, every: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = examples.inputs.reshape(len(examples.labels), 28, 28)[::every, ::2, ::2]
        return (pixels.reshape(len(pixels), -1) / 255).astype(np.float32), examples.labels[::every]

    return Images(*flat(data.train, 3), *flat(data.held_out, 2))


def layers(w: np.ndarray) -> list[np.ndarray]:
    """Views of a flat model: weights and biases of two layers."""
    cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
    return [part.reshape(shape) for part, shape in zip(np.split(w, cuts[:-1]), SHAPES, strict=True)]


def narrow_coordinates() -> np.ndarray:
    """The coordinates of a model with the first half of the hidden units."""
    numbers = np.arange(SIZE)
    a, b, c, d = layers(numbers)
    half = HIDDEN // 2
    return np.concatenate([a[:, :half].ravel(), b[:half], c[:half].ravel(), d])


def trained(w: np.ndarray, x: np.ndarray, y: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """What mini-batch SGD of the cross entropy changes, [n, size of w], of n workers side by side.

    `batches` [n, STEPS, BATCH] are indices of examples. The width of the network follows from the size of `w`.
    """
    n, hidden = len(batches), (len(w) - CLASSES) // (INPUTS + 1 + CLASSES)
    ends = np.cumsum([INPUTS * hidden, hidden, hidden * CLASSES])
    cut = np.split(w, ends)
    a = np.repeat(cut[0].reshape(1, INPUTS, hidden), n, 0)
    b = np.repeat(cut[1].reshape(1, 1, hidden), n, 0)
    c = np.repeat(cut[2].reshape(1, hidden, CLASSES), n, 0)
    d = np.repeat(cut[3].reshape(1, 1, CLASSES), n, 0)
    one_hot, rate = np.eye(CLASSES, dtype=np.float32), np.float32(RATE)
    for step in range(STEPS):
        batch = batches[:, step]
        inputs = x[batch]
        units = np.maximum(inputs @ a + b, 0)
        scores = units @ c + d
        scores = np.exp(scores - scores.max(2, keepdims=True))
        scores = (scores / scores.sum(2, keepdims=True) - one_hot[y[batch]]) / BATCH
        back = scores @ c.transpose(0, 2, 1) * (units > 0)
        a -= rate * (inputs.transpose(0, 2, 1) @ back)
        b -= rate * back.sum(1, keepdims=True)
        c -= rate * (units.transpose(0, 2, 1) @ scores)
        d -= rate * scores.sum(1, keepdims=True)
    changed: np.ndarray = np.concatenate([each.reshape(n, -1) for each in (a, b, c, d)], 1) - w
    return changed


def attacked(attack: str, honest: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """The updates of attackers; `bad` are what they would have sent if honest."""
    mean, spread = honest.mean(axis=0), honest.std(axis=0)
    if attack == "sign":
        return -bad
    if attack == "scaled":
        return -10 * bad
    if attack == "alie":
        # So many supporters among the honest make the shifted value the majority's.
        supporters = (len(honest) + len(bad)) // 2 + 1 - len(bad)
        z = NormalDist().inv_cdf((len(honest) - supporters) / len(honest))
        return np.tile(mean - z * spread, (len(bad), 1))
    if attack == "inner":
        return np.tile(-0.5 * mean, (len(bad), 1))
    return bad


def combined(rule: str, sent: np.ndarray) -> np.ndarray:
    """The step of a round from updates [n, size]."""
    aggregation = aggregation_of(rule)
    if aggregation is None:
        return sent.mean(axis=0)
    verdict = aggregation.judge(sent @ sent.T)
    if verdict.combine is not None:
        return verdict.combine(sent)
    assert verdict.shares is not None
    return verdict.shares @ sent


def blocks_of(workers: int, mixed: bool) -> list[Block]:
    everyone, all_of_it = np.arange(workers), np.arange(SIZE)
    if not mixed:
        return [Block(everyone, all_of_it)]
    inner = narrow_coordinates()
    return [Block(everyone, inner), Block(everyone[everyone % 3 != 1], np.setdiff1d(all_of_it, inner))]


def sent_by_all(cell: Cell, w: np.ndarray, images: Images, parts: list[np.ndarray], rng: Any) -> np.ndarray:
    """Updates [workers, SIZE] before any attack but that on labels; outer coordinates of narrow workers are 0."""
    batches = np.stack([part[rng.integers(0, len(part), (STEPS, BATCH))] for part in parts])
    labels = np.where(cell.attack == "labels", CLASSES - 1 - images.y, images.y)
    sent = np.zeros((cell.workers, SIZE))
    widths = {False: np.arange(SIZE)} | ({True: narrow_coordinates()} if cell.mixed else {})
    numbers = np.arange(cell.workers)
    for narrow, coordinates in widths.items():
        for bad in (False, True):
            mine = numbers[((numbers % 3 == 1) & cell.mixed == narrow) & ((numbers < cell.attackers) == bad)]
            if len(mine):
                found = trained(w[coordinates], images.x, labels if bad else images.y, batches[mine])
                sent[np.ix_(mine, coordinates)] = found
    return sent


def played(cell: Cell, images: Images) -> float:
    """Accuracy in percent after the rounds."""
    rng = np.random.default_rng(cell.seed)
    parts = parse_partition(cell.partition).split(images.y, cell.workers, cell.seed)
    w = np.zeros(SIZE, np.float32)
    first, _, last, _ = layers(w)
    first[:], last[:] = (
        rng.normal(0, np.sqrt(2 / INPUTS), first.shape),
        rng.normal(0, np.sqrt(2 / HIDDEN), last.shape),
    )
    rule = cell.rule.format(f=max(1, cell.attackers))
    int8, spec = Uniform(), TensorSpec("w", "float32", (SIZE,))
    for _ in range(cell.rounds):
        sent = sent_by_all(cell, w, images, parts, rng)
        blocks = blocks_of(cell.workers, cell.mixed)
        for block in blocks if cell.attackers else ():
            bad, honest = (block.workers[(block.workers < cell.attackers) == which] for which in (True, False))
            mine = sent[:, block.coordinates]
            sent[np.ix_(bad, block.coordinates)] = attacked(cell.attack, mine[honest], mine[bad])
        for number in range(2, cell.workers, 3) if cell.mixed else ():
            sent[number] = int8.decode(int8.encode(sent[number].astype(np.float32), rng), spec)
        for block in blocks:
            w[block.coordinates] += combined(rule, sent[np.ix_(block.workers, block.coordinates)]).astype(
                np.float32
            )
        if not np.isfinite(w).all():
            return 100 / CLASSES
    a, b, c, d = layers(w)
    scores = np.maximum(images.test_x @ a + b, 0) @ c + d
    return float(100 * (scores.argmax(axis=1) == images.test_y).mean())


def cells(asked: argparse.Namespace) -> Iterator[Cell]:
    """All runs that were asked for, a seed of each cell after the other."""
    rules = PARTIAL_RULES if asked.mixed else RULES
    for seed, partition, share in product(range(asked.seeds), asked.partitions, asked.shares):
        for attack, rule in product(ATTACKS if share else ("none",), rules):
            yield Cell(asked.workers, asked.mixed, partition, share, attack, rule, seed, asked.rounds)


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of each fleet and partition: means over the seeds."""
    kinds = dict.fromkeys((line["mixed"], line["workers"], line["partition"]) for line in lines)
    for kind in sorted(kinds):
        mine = [line for line in lines if (line["mixed"], line["workers"], line["partition"]) == kind]
        found: dict[tuple[float, str, str], list[float]] = {}
        for line in mine:
            found.setdefault((line["share"], line["attack"], line["rule"]), []).append(line["accuracy"])
        seeds = {len(each) for each in found.values()}
        spread = max((stdev(each) for each in found.values() if len(each) > 1), default=0.0)
        rules = list(dict.fromkeys(line["rule"] for line in mine))
        print(f"\n{kind}: {min(seeds)} to {max(seeds)} seeds, largest deviation {spread:.1f}\n")
        print(
            f"| {kind[2]}, {kind[1]} workers | attack | "
            + " | ".join(each.replace(":f={f}", "") for each in rules)
            + " |"
        )
        print("| --- " * (2 + len(rules)) + "|")
        for share, attack in sorted(
            dict.fromkeys(key[:2] for key in found), key=lambda key: (key[0], ("none", *ATTACKS).index(key[1]))
        ):
            values = [found.get((share, attack, rule)) for rule in rules]
            texts = ["-" if each is None else f"{fmean(each):.1f}" for each in values]
            print(f"| {share:.0%} | {attack} | " + " | ".join(texts) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of one JSON line per run")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and run nothing")
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--mixed", action="store_true", help="whole, narrow and int8 workers")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2])
    parser.add_argument("--partitions", nargs="+", default=["iid", "dirichlet:0.5"])
    asked = parser.parse_args()
    if asked.show:
        show([json.loads(text) for text in asked.show.read_text().splitlines()])
        return
    if not asked.out:
        parser.error("--out or --show")
    done = [json.loads(text) for text in asked.out.read_text().splitlines()] if asked.out.exists() else []
    images = load()
    for cell in cells(asked):
        if any(vars(cell).items() <= line.items() for line in done):
            continue
        begun = time.process_time()
        accuracy = round(played(cell, images), 2)
        line = vars(cell) | {"accuracy": accuracy, "cpu_s": round(time.process_time() - begun, 2)}
        with asked.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""Accuracy of every aggregation rule under attack: a small network on Fashion-MNIST, in NumPy.

    python -m tools.bench.robust                          20 workers, 0, 10 and 20 % attackers
    python -m tools.bench.robust --rounds 10 --seeds 1    a short look

The updates of a round are arrays, and the rules those of `fedgrpc.aggregation.robust`. So it measures the rules,
not the transport. Attacks: sign flip, scaled (by -10), label flip, ALIE (arXiv 1902.06156), inner product (arXiv
1903.03936). An attacker knows what all honest workers send.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fedgrpc.aggregation.robust.aggregation import aggregation_of
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import parse_partition

HIDDEN, CLASSES = 64, 10
ATTACKS = ("sign", "scaled", "labels", "alie", "inner")
RULES = (
    *("mean", "median", "trimmed-mean:0.2", "geometric-median", "krum:f={f}", "multi-krum:f={f}", "centered-clip"),
    *("nnm:f={f}+median", "nnm:f={f}+trimmed-mean:0.2"),
)


def unpacked(w: np.ndarray, inputs: int) -> list[np.ndarray]:
    """Views of a flat model: weights and biases of two layers."""
    shapes = [(inputs, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(w, cuts[:-1]), shapes, strict=True)]


def outputs(w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d = unpacked(w, x.shape[1])
    hidden = np.maximum(x @ a + b, 0)
    return hidden, hidden @ c + d


def trained(w: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, steps: int) -> np.ndarray:
    """Mini-batch SGD of the cross entropy."""
    w = w.copy()
    parts = unpacked(w, x.shape[1])
    for _ in range(steps):
        batch = rng.integers(0, len(x), 64)
        hidden, scores = outputs(w, x[batch])
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        scores[np.arange(len(batch)), y[batch]] -= 1
        scores /= len(batch)
        back = scores @ parts[2].T * (hidden > 0)
        for part, gradient in zip(
            parts, (x[batch].T @ back, back.sum(axis=0), hidden.T @ scores, scores.sum(axis=0)), strict=True
        ):
            part -= np.float32(0.1) * gradient
    return w


def attacked(attack: str, honest: np.ndarray, bad: np.ndarray, count: int) -> np.ndarray:
    """The updates of attackers; `bad` are what they would have sent if honest."""
    mean, spread = honest.mean(axis=0), honest.std(axis=0)
    if attack == "sign":
        return -bad
    if attack == "scaled":
        return -10 * bad
    if attack == "alie":
        # So many supporters among the honest make the shifted value the majority's.
        supporters = count // 2 + 1 - len(bad)
        z = NormalDist().inv_cdf((count - len(bad) - supporters) / (count - len(bad)))
        return np.tile(mean - z * spread, (len(bad), 1))
    if attack == "inner":
        return np.tile(-0.5 * mean, (len(bad), 1))
    return bad


def played(
    rule: str,
    attack: str,
    attackers: int,
    shares: list[tuple[np.ndarray, np.ndarray]],
    test: tuple[np.ndarray, np.ndarray],
    rounds: int,
    seed: int,
) -> float:
    """Accuracy in percent after the rounds."""
    rng, inputs, count = np.random.default_rng(seed), test[0].shape[1], len(shares)
    w = np.concatenate(
        [
            *(rng.normal(0, np.sqrt(2 / inputs), inputs * HIDDEN), np.zeros(HIDDEN)),
            *(rng.normal(0, np.sqrt(2 / HIDDEN), HIDDEN * CLASSES), np.zeros(CLASSES)),
        ]
    ).astype(np.float32)
    for _ in range(rounds):
        sent = np.stack(
            [
                trained(w, x, CLASSES - 1 - y if attack == "labels" and k < attackers else y, rng, 20) - w
                for k, (x, y) in enumerate(shares)
            ]
        ).astype(np.float64)
        if attackers:
            sent[:attackers] = attacked(attack, sent[attackers:], sent[:attackers], count)
        aggregation = aggregation_of(rule.format(f=max(1, attackers)))
        if aggregation is None:
            step = sent.mean(axis=0)
        else:
            verdict = aggregation.judge(sent @ sent.T)
            step = verdict.combine(sent) if verdict.combine else verdict.shares @ sent
        w = (w + step).astype(np.float32)
        if not np.isfinite(w).all():
            return 10.0
    return float(100 * (outputs(w, test[0])[1].argmax(axis=1) == test[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2])
    parser.add_argument("--partitions", nargs="+", default=["iid", "dirichlet:0.5"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    data = load_fashion_mnist(None)

    def flat(examples: object, every: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = examples.inputs.reshape(len(examples.labels), 28, 28)[::every, ::2, ::2]  # type: ignore[attr-defined]
        return (pixels.reshape(len(pixels), -1) / 255).astype(np.float32), examples.labels[::every]  # type: ignore[attr-defined]

    (x, y), test = flat(data.train, 3), flat(data.held_out, 2)
    rows, began = [], time.perf_counter()
    print("| partition | attackers | attack | " + " | ".join(rule.format(f="f") for rule in RULES) + " |")
    print("| --- " * (3 + len(RULES)) + "|")
    for partition in asked.partitions:
        for share in asked.shares:
            for attack in ATTACKS if share else ("none",):
                means = []
                for rule in RULES:
                    found = []
                    for seed in range(asked.seeds):
                        parts = parse_partition(partition).split(y, asked.workers, seed)
                        shares = [(x[part], y[part]) for part in parts]
                        attackers = round(share * asked.workers)
                        found.append(played(rule, attack, attackers, shares, test, asked.rounds, seed))
                    means.append(float(np.mean(found)))
                    rows.append([partition, share, attack, rule, found])
                print(
                    f"| {partition} | {share:.0%} | {attack} | " + " | ".join(f"{m:.1f}" for m in means) + " |",
                    flush=True,
                )
    print(f"\n{time.perf_counter() - began:.0f} s")
    if asked.json:
        asked.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()

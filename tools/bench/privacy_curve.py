"""Accuracy against epsilon: Fashion-MNIST with a thousand devices, in one process.

    python -m tools.bench.privacy_curve [--seeds 3] [--plot docs/images/privacy.png]

Devices and selection are arrays of NumPy. Noise multipliers, noise, its streams and the loss are those of
`fedgrpc.privacy`, and clipping is that of a commit. The model is softmax regression on images of 14 x 14.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgrpc.aggregation.scaling import clip_scale
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.privacy.ledger import ledger_of
from fedgrpc.privacy.noise import RoundNoise
from fedgrpc.privacy.policy import PrivacyPolicy
from tools.pictures import draw_privacy

DEVICES, EACH, COHORT, ROUNDS = 1000, 60, 100, 30
DELTA, CLIP, STEPS, RATE = 1e-4, 0.5, 3, 1.0
EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Way:
    """One way to release versions."""

    name: str
    mechanism: str
    separation: int = 1
    rate: float | None = None


WAYS = (
    Way("gaussian, any choice", "gaussian"),
    Way("gaussian, once in 10 versions", "gaussian", separation=10),
    Way("gaussian, Poisson sample 0.1", "gaussian", rate=COHORT / DEVICES),
    Way("dp-ftrl, once in 10 versions", "dp-ftrl", separation=10),
)


@dataclass(frozen=True)
class Data:
    """Images and labels of each device, and those held out."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load() -> Data:
    """Split the training images evenly over the devices, without regard to labels."""
    data = load_fashion_mnist()

    def prepared(images: np.ndarray) -> np.ndarray:
        small = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196).astype(np.float32)
        small = small / max(1.0, float(images.max()))
        # A last one that is always 1: the bias.
        centred = small - small.mean(1, keepdims=True)
        return np.concatenate([centred, np.ones((len(small), 1), np.float32)], 1)

    order = np.random.default_rng(0).permutation(len(data.train.labels))[: DEVICES * EACH]
    x = prepared(np.asarray(data.train.inputs))[order].reshape(DEVICES, EACH, -1)
    y = np.asarray(data.train.labels)[order].reshape(DEVICES, EACH)
    return Data(x, y, prepared(np.asarray(data.held_out.inputs)), np.asarray(data.held_out.labels))


def differences(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Train each of these devices for a few full-batch steps; return what changed."""
    local = np.repeat(w[None], len(x), 0)
    one_hot = np.eye(10, dtype=np.float32)[y]
    for _ in range(STEPS):
        logits = x @ local
        logits -= logits.max(2, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(2, keepdims=True)
        local -= RATE * x.transpose(0, 2, 1) @ (p - one_hot) / EACH
    changed: np.ndarray = local - w
    return changed


def accuracy(data: Data, way: Way | None, epsilon: float, seed: int) -> float:
    """Play a whole run; `way` None: without noise."""
    rng, w = np.random.default_rng(seed), np.zeros((data.x.shape[2], 10), np.float32)
    ledger = None
    if way is not None:
        policy = PrivacyPolicy(
            way.mechanism,
            None,
            epsilon,
            DELTA,
            COHORT,
            way.separation,  # type: ignore[arg-type]
        )
        ledger = ledger_of(policy, CLIP, way.rate, ROUNDS)
    key, last = rng.bytes(32), np.full(DEVICES, -DEVICES)
    for step in range(1, ROUNDS + 1):
        if way is not None and way.rate is not None:
            chosen = np.flatnonzero(rng.random(DEVICES) < way.rate)
        else:
            rested = np.flatnonzero(step - last >= (1 if way is None else way.separation))
            chosen = rng.choice(rested, min(COHORT, len(rested)), replace=False)
        last[chosen] = step
        changed = differences(w, data.x[chosen], data.y[chosen])
        scales = [clip_scale(float(np.linalg.norm(each)), CLIP) for each in changed]
        mean = np.tensordot(np.array(scales), changed.astype(np.float64), 1) / COHORT
        if ledger is not None:
            noise = RoundNoise(key, step, ledger.rules.tree).normals("w", mean.size).reshape(mean.shape)
            mean += ledger.rules.deviation * noise
        w = (w + mean).astype(np.float32)
    if ledger is not None:
        assert ledger.epsilon(more=ROUNDS) <= epsilon
    return float(((data.test_x @ w).argmax(1) == data.test_y).mean())


def main() -> None:
    """Print a table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    data, seeds = load(), range(asked.seeds)
    load_before = os.getloadavg()[0]
    plain = [accuracy(data, None, 0.0, seed) for seed in seeds]
    print(f"clipped, without noise: {np.mean(plain):.3f}", flush=True)
    print("| way | " + " | ".join(f"{epsilon:g}" for epsilon in EPSILONS) + " |", flush=True)
    found: dict[str, list[list[float]]] = {}
    for way in WAYS:
        found[way.name] = [[accuracy(data, way, epsilon, seed) for seed in seeds] for epsilon in EPSILONS]
        cells = (f"{np.mean(each):.3f} ± {np.std(each):.3f}" for each in found[way.name])
        print(f"| {way.name} | " + " | ".join(cells) + " |", flush=True)
    print(f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after", flush=True)
    if asked.plot is not None:
        _plot(found, float(np.mean(plain)), asked.plot)


def _plot(found: dict[str, list[list[float]]], plain: float, path: Path) -> None:
    curves = {
        name: [(e, float(np.mean(each)), float(np.std(each))) for e, each in zip(EPSILONS, values, strict=True)]
        for name, values in found.items()
    }
    draw_privacy(curves, plain, DELTA, path)


if __name__ == "__main__":
    main()

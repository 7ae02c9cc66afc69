"""A learning task for simulations: softmax regression on blobs, in NumPy, in milliseconds."""

from __future__ import annotations

import numpy as np

from fedgrpc.datasets.partition import parse_part, parse_partition
from fedgrpc.trainer import EvalResult, TrainResult

CLASSES = 4
FEATURES = 300


class Blobs:
    def __init__(self, partition: str | None = None, part: str | None = None, seed: int = 0, fails: bool = False):
        rng = np.random.default_rng(99)
        centres = rng.normal(size=(CLASSES, FEATURES)) * 0.3
        labels = rng.integers(CLASSES, size=1200)
        inputs = centres[labels] + rng.normal(size=(1200, FEATURES))
        self._held_out = inputs[1000:], labels[1000:]
        self._x, self._y = inputs[:1000], labels[:1000]
        self._fails = fails
        if partition is not None and part is not None:
            index, parts = parse_part(part)
            own = parse_partition(partition).split(self._y, parts, seed)[index]
            self._x, self._y = self._x[own], self._y[own]

    def initial_weights(self):
        return {"w": np.zeros((FEATURES, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}

    def train(self, weights, job):
        if self._fails:
            raise RuntimeError("no camera")
        w, b = weights["w"].copy(), weights["b"].copy()
        steps = 0
        for batch in job.batches(len(self._y), 16):
            error = _probabilities(self._x[batch], w, b)
            error[np.arange(len(batch)), self._y[batch]] -= 1
            w -= 0.1 * (self._x[batch].T @ error / len(batch)).astype(np.float32)
            b -= 0.1 * error.mean(axis=0).astype(np.float32)
            steps += 1
        return TrainResult({"w": w, "b": b}, len(self._y), steps, {"loss": 1.0 / steps})

    def evaluate(self, weights):
        x, y = self._held_out
        p = _probabilities(x, weights["w"], weights["b"])
        return EvalResult(len(y), {"accuracy": float((p.argmax(axis=1) == y).mean())})


def _probabilities(x, w, b):
    logits = x @ w + b
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)

"""Softmax regression in NumPy alone: a trainer needs no torch.

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task bring_your_own_numpy --data shares/part-1-of-5.npz

`python -m fedgrpc.datasets.shares digits --parts 5 --partition dirichlet:0.5 --to shares` writes such shares.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedgrpc.datasets.shares import load_named
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights


class SoftmaxRegression:
    def __init__(self, data: Path | None = None, brightest: float = 16.0) -> None:
        digits = load_named("digits", data)
        self._x = digits.train.inputs.reshape(-1, 64) / brightest
        self._y = digits.train.labels
        self._held_out_x = digits.held_out.inputs.reshape(-1, 64) / brightest
        self._held_out_y = digits.held_out.labels

    def initial_weights(self) -> Weights:
        return {"weight": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        weight, bias = weights["weight"].copy(), weights["bias"].copy()
        rate = job.learning_rate or 0.1
        steps = 0
        for batch in job.batches(len(self._y), 32):
            x, error = self._x[batch], probabilities(self._x[batch], weight, bias)
            error[np.arange(len(batch)), self._y[batch]] -= 1
            weight -= rate * (x.T @ error / len(batch)).astype(np.float32)
            bias -= rate * error.mean(axis=0).astype(np.float32)
            steps += 1
        return TrainResult({"weight": weight, "bias": bias}, len(self._y), steps)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        if not len(self._held_out_y):
            return None
        p = probabilities(self._held_out_x, weights["weight"], weights["bias"])
        own = p[np.arange(len(p)), self._held_out_y]
        accuracy = float((p.argmax(axis=1) == self._held_out_y).mean())
        return EvalResult(len(p), {"loss": float(-np.log(own + 1e-12).mean()), "accuracy": accuracy})


def probabilities(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = x @ weight + bias
    exponentials: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    exponentials /= exponentials.sum(axis=1, keepdims=True)
    return exponentials

"""A multi-layer perceptron of scikit-learn, trained batch by batch with `partial_fit`.

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task sklearn_mlp --data shares/part-1-of-5.npz
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

from fedgrpc.datasets.shares import load_named
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights

CLASSES = np.arange(10)


class Perceptron:
    def __init__(self, data: Path | None = None, hidden: int = 32) -> None:
        digits = load_named("digits", data)
        self._x, self._y = digits.train.inputs.reshape(-1, 64) / 16, digits.train.labels
        self._held_out_x = digits.held_out.inputs.reshape(-1, 64) / 16
        self._held_out_y = digits.held_out.labels
        self._hidden = hidden

    def initial_weights(self) -> Weights:
        return weights_of(self._estimator(0.1, 0))

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        estimator, steps = self._estimator(job.learning_rate or 0.1, job.seed, weights), 0
        for batch in job.batches(len(self._y), 32):
            estimator.partial_fit(self._x[batch], self._y[batch])
            steps += 1
        return TrainResult(weights_of(estimator), len(self._y), steps)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        if not len(self._held_out_y):
            return None
        probabilities = self._estimator(0.1, 0, weights).predict_proba(self._held_out_x)
        loss = float(log_loss(self._held_out_y, probabilities, labels=CLASSES))
        accuracy = float((probabilities.argmax(axis=1) == self._held_out_y).mean())
        return EvalResult(len(self._held_out_y), {"loss": loss, "accuracy": accuracy})

    def _estimator(self, rate: float, seed: int, weights: Weights | None = None) -> MLPClassifier:
        """An estimator that holds `weights`, as if it had been fitted."""
        estimator = MLPClassifier((self._hidden,), solver="sgd", learning_rate_init=rate, random_state=seed)
        estimator.partial_fit(np.zeros((10, 64)), CLASSES, classes=CLASSES)  # only to allocate
        for name, array in (weights or {}).items():
            kind, layer = name.split(".")
            getattr(estimator, kind)[int(layer)][...] = array
        return estimator


def weights_of(estimator: MLPClassifier) -> Weights:
    both = {"coefs_": estimator.coefs_, "intercepts_": estimator.intercepts_}
    return {f"{kind}.{layer}": array.copy() for kind, arrays in both.items() for layer, array in enumerate(arrays)}

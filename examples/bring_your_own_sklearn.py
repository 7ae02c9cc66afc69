"""A scikit-learn estimator, trained batch by batch with `partial_fit`.

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task bring_your_own_sklearn --data shares/part-1-of-5.npz
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss

from fedgrpc.datasets.shares import load_named
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights

CLASSES = np.arange(10)


class LinearClassifier:
    def __init__(self, data: Path | None = None) -> None:
        digits = load_named("digits", data)
        self._x, self._y = digits.train.inputs.reshape(-1, 64) / 16, digits.train.labels
        self._held_out_x = digits.held_out.inputs.reshape(-1, 64) / 16
        self._held_out_y = digits.held_out.labels

    def initial_weights(self) -> Weights:
        return {"coef": np.zeros((10, 64)), "intercept": np.zeros(10)}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        estimator, steps = _estimator(weights, job.learning_rate or 0.1, job.seed), 0
        for batch in job.batches(len(self._y), 64):
            estimator.partial_fit(self._x[batch], self._y[batch])
            steps += 1
        trained = {"coef": estimator.coef_.copy(), "intercept": estimator.intercept_.copy()}
        return TrainResult(trained, len(self._y), steps)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        if not len(self._held_out_y):
            return None
        estimator = _estimator(weights, 0.1, 0)
        loss = log_loss(self._held_out_y, estimator.predict_proba(self._held_out_x), labels=CLASSES)
        accuracy = float(estimator.score(self._held_out_x, self._held_out_y))
        return EvalResult(len(self._held_out_y), {"loss": float(loss), "accuracy": accuracy})


def _estimator(weights: Weights, learning_rate: float, seed: int) -> SGDClassifier:
    """An estimator that holds `weights`, as if it had been fitted."""
    estimator = SGDClassifier(
        loss="log_loss", penalty=None, learning_rate="constant", eta0=learning_rate, random_state=seed
    )
    estimator.partial_fit(np.zeros((10, 64)), CLASSES, classes=CLASSES)  # only to allocate
    estimator.coef_ = weights["coef"].copy()
    estimator.intercept_ = weights["intercept"].copy()
    return estimator

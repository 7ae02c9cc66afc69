"""A model in JAX and Flax, with Optax, through the trainer for NumPy: which digit is it?

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task jax_flax --data shares/part-1-of-5.npz
pip install jax flax optax
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

from fedgrpc.datasets.shares import load_named
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.relu(linen.Dense(64)(x)))


def loss_of(parameters, x, y):
    outputs = Network().apply({"params": parameters}, x)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(), outputs


gradient_of = jax.jit(jax.value_and_grad(loss_of, has_aux=True))


class Digits:
    def __init__(self, data: Path | None = None) -> None:
        digits = load_named("digits", data)
        self._x, self._y = digits.train.inputs.reshape(-1, 64) / 16, digits.train.labels
        self._held_out = digits.held_out.inputs.reshape(-1, 64) / 16, digits.held_out.labels

    def initial_weights(self) -> Weights:
        return weights_of(Network().init(jax.random.PRNGKey(0), np.zeros((1, 64)))["params"])

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        parameters, optimizer = unflatten_dict(dict(weights), sep="."), optax.sgd(job.learning_rate or 0.1, 0.9)
        state, steps = optimizer.init(parameters), 0
        for batch in job.batches(len(self._y), 32):
            _, gradient = gradient_of(parameters, self._x[batch], self._y[batch])
            change, state = optimizer.update(gradient, state)
            parameters, steps = optax.apply_updates(parameters, change), steps + 1
        return TrainResult(weights_of(parameters), len(self._y), steps)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        x, y = self._held_out
        if not len(y):
            return None
        loss, outputs = loss_of(unflatten_dict(dict(weights), sep="."), x, y)
        return EvalResult(len(y), {"loss": float(loss), "accuracy": float((outputs.argmax(1) == y).mean())})


def weights_of(parameters) -> Weights:
    return {name: np.array(array) for name, array in flatten_dict(parameters, sep=".").items()}

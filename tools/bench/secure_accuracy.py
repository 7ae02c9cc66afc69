"""Federated averaging of a small network on Fashion-MNIST through secure sums, for `tools.bench.secure_sum`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedgrpc.codec.layout import Array
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import Dirichlet
from fedgrpc.privacy.bounded_rounding import grid_bound
from fedgrpc.privacy.secure_vector import SecureVector, bounds_after
from tools.bench.secure_sum import VirtualSum

_WORKERS = 16
HIDDEN = 64
_WEIGHT_BITS = 8
# Before there is a round to learn it from.
_FIRST_BOUND = 0.25
_CLIP_NORM = 10.0

Tensors = dict[str, Array]


def accuracies(
    bits: int, rounds: int, seed: int, coordinates: float = 1.0, server_rate: float = 1.0
) -> tuple[float, float]:
    """Return the accuracy after `rounds`, and the share of values that were clipped. 0 bits: float updates.

    A round's sum has the share `coordinates` of each large tensor. The mean counts `server_rate` times.
    """
    # Training draws the same numbers with and without a secure sum.
    rng, rounding = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    data = load_fashion_mnist()
    train, test = (inputs_of(part.inputs) for part in (data.train, data.held_out))
    parts = Dirichlet(0.5).split(data.train.labels, _WORKERS, seed)
    model = first_model(rng)
    shapes = {name: tensor.shape for name, tensor in model.items()}
    bounds = dict.fromkeys(model, _FIRST_BOUND)
    clipped = 0.0
    for number in range(rounds):
        rate = 0.1 * (1 + np.cos(np.pi * number / rounds)) / 2
        updates = []
        for part in parts:
            trained = trained_from(model, train[part], data.train.labels[part], rate, rng)
            updates.append({name: trained[name] - before for name, before in model.items()})
        examples = [len(part) for part in parts]
        if bits:
            clipped += _clipped(updates, bounds) / rounds
            below = int(coordinates * 2**32) if coordinates < 1 else 0
            about = {"coordinates": below, "seed": rounding.bytes(16)} if below else {}
            vector = SecureVector(shapes, bounds, bits, _WEIGHT_BITS, _WORKERS, max(examples), **about)
            change = _secure_mean(vector, updates, examples, rounding)
            bounds |= bounds_after(change, _CLIP_NORM)
            # What the sum says nothing of stays as it is.
            change = {name: server_rate * np.nan_to_num(mean) for name, mean in change.items()}
        else:
            change = {
                name: np.average(np.stack([update[name] for update in updates]), axis=0, weights=examples)
                for name in model
            }
        model = {name: before + change[name] for name, before in model.items()}
    right = outputs_of(model, test)[1].argmax(1) == data.held_out.labels
    return float(right.mean()), clipped


def _secure_mean(
    vector: SecureVector, updates: list[Tensors], examples: list[int], rng: np.random.Generator
) -> Tensors:
    """Return the weighted mean of all updates from one secure sum."""
    world = VirtualSum(len(updates), vector.sum_bits, 0.0, int(rng.integers(1 << 30)))
    world.share()
    packed = [
        world.mask(name, np.concatenate(list(vector.pieces(update, count, rng))))
        for name, update, count in zip(world.names, updates, examples, strict=True)
    ]
    world.arrive()
    return vector.means(world.unmasked(world.sum_of(packed, vector.size), world.answer()))


def lengths_left(bits: Sequence[int], seed: int) -> Iterator[list[float]]:
    """Yield for each device how much of its first update's length the grids for noise hold, at these bits.

    The clip norm is the length of the update.
    """
    rng, data = np.random.default_rng(seed), load_fashion_mnist()
    train, model = inputs_of(data.train.inputs), first_model(rng)
    for part in Dirichlet(0.5).split(data.train.labels, _WORKERS, seed):
        trained = trained_from(model, train[part], data.train.labels[part], 0.1, rng)
        update = np.concatenate([(trained[name] - model[name]).ravel() for name in model])
        norm = float(np.linalg.norm(update))
        bounds = [grid_bound(norm, update.size, each) for each in bits]
        yield [float(np.linalg.norm(np.clip(update, -bound, bound))) / norm for bound in bounds]


def first_model(rng: np.random.Generator) -> Tensors:
    """Return a network with one hidden layer: 50,890 parameters."""
    model = {"W1": rng.normal(0, 0.05, (784, HIDDEN)), "b1": np.zeros(HIDDEN)}
    return model | {"W2": rng.normal(0, 0.1, (HIDDEN, 10)), "b2": np.zeros(10)}


def inputs_of(images: Array) -> Array:
    """Return images as rows of numbers around 0."""
    scaled: Array = images.reshape(len(images), -1).astype(np.float32) / 255 - 0.2860
    return scaled


def outputs_of(model: Tensors, inputs: Array) -> tuple[Array, Array]:
    """Return the values of the hidden layer, and the scores of all classes."""
    hidden = np.maximum(inputs @ model["W1"] + model["b1"], 0)
    return hidden, hidden @ model["W2"] + model["b2"]


def trained_from(model: Tensors, inputs: Array, labels: Array, rate: float, rng: np.random.Generator) -> Tensors:
    """Return the model after one epoch of plain SGD in batches of 32."""
    model = {name: tensor.astype(np.float32) for name, tensor in model.items()}
    order = rng.permutation(len(labels))
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        hidden, outputs = outputs_of(model, inputs[batch])
        shares = np.exp(outputs - outputs.max(1, keepdims=True))
        slope = shares / shares.sum(1, keepdims=True)
        slope[np.arange(len(batch)), labels[batch]] -= 1
        slope /= len(batch)
        inner = (slope @ model["W2"].T) * (hidden > 0)
        slopes = {"W1": inputs[batch].T @ inner, "b1": inner.sum(0), "W2": hidden.T @ slope, "b2": slope.sum(0)}
        for name, tensor in model.items():
            tensor -= (rate * slopes[name]).astype(np.float32)
    return model


def _clipped(updates: list[Tensors], bounds: dict[str, float]) -> float:
    """Return the share of values beyond their bound."""
    beyond = sum(int((np.abs(update[name]) > bounds[name]).sum()) for update in updates for name in update)
    return beyond / sum(tensor.size for update in updates for tensor in update.values())

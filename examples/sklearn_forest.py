"""Bagging of scikit-learn's decision trees: each device brings trees of its own, and the model is all of them.

fedgrpc aggregator --aggregation sklearn_forest:Sum --encoding raw+zstd --rounds 1 --task sklearn_forest:Forest
fedgrpc worker --aggregator HOST:PORT --name pi-1 --task sklearn_forest:Forest --partition iid --part 1/5

A device writes to its own rows of the tensors. So the sum of all differences holds every device's trees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.tree import DecisionTreeClassifier

from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.partition import parse_part, parse_partition
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights

LEAVES = 64
FIELDS = ("feature", "threshold", "left", "right")


@dataclass(frozen=True)
class Sum:
    least: ClassVar[int] = 1

    def combine(self, updates: np.ndarray) -> np.ndarray:
        return np.nansum(updates, axis=0)


class Forest:
    def __init__(self, partition: str = "iid", part: str = "1/1", seed: int = 0, trees: int = 5) -> None:
        digits, (self._own, self._parts), self._trees = load_digits(), parse_part(part), trees
        labels = digits.train.labels
        mine = digits.train.take(parse_partition(partition).split(labels, self._parts, seed)[self._own])
        self._x, self._y = mine.inputs.reshape(-1, 64).astype(np.float32), mine.labels
        self._held_out_x, self._held_out_y = digits.held_out.inputs.reshape(-1, 64), digits.held_out.labels

    def initial_weights(self) -> Weights:
        shape = (self._parts, self._trees, 2 * LEAVES)
        return {name: np.zeros(shape, np.float32) for name in FIELDS} | {
            "value": np.zeros((*shape, 10), np.float32)
        }

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        grown = {name: array.copy() for name, array in weights.items()}
        for number in range(self._trees):
            rows = np.random.default_rng((job.seed, number)).choice(len(self._y), len(self._y))
            tree = DecisionTreeClassifier(max_leaf_nodes=LEAVES, max_features="sqrt", random_state=number)
            nodes = tree.fit(self._x[rows], self._y[rows]).tree_
            places, leaf = np.arange(nodes.node_count), nodes.children_left < 0
            fields = (nodes.feature, nodes.threshold, nodes.children_left, nodes.children_right)
            for name, array in zip(FIELDS, fields, strict=True):
                own = places if name in ("left", "right") else 0  # a leaf leads to itself
                grown[name][self._own, number, places] = np.where(leaf, own, array)
            grown["value"][self._own, number][np.ix_(places, tree.classes_)] = nodes.value[:, 0]
        return TrainResult(grown, len(self._y), self._trees)

    def evaluate(self, weights: Weights) -> EvalResult:
        rows, votes = np.arange(len(self._held_out_x)), 0.0
        for tree in np.ndindex(weights["feature"].shape[:2]):
            feature, threshold, left, right = (weights[name][tree] for name in FIELDS)
            node = np.zeros(len(rows), int)
            for _ in range(LEAVES):
                below = self._held_out_x[rows, feature[node].astype(int)] <= threshold[node]
                node = np.where(below, left[node], right[node]).astype(int)
            votes = votes + weights["value"][tree][node]
        return EvalResult(len(rows), {"accuracy": float((np.argmax(votes, axis=1) == self._held_out_y).mean())})

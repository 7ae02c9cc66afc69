"""Boosted trees of XGBoost by bagging: in each round, each device adds a tree to what all have grown before.

fedgrpc aggregator --aggregation xgboost_bagging:Sum --encoding raw+zstd --rounds 8 --task xgboost_bagging:Trees
fedgrpc worker --aggregator HOST:PORT --name pi-1 --task xgboost_bagging:Trees --partition iid --part 1/5
pip install xgboost-cpu

A tree is bytes in the row of its round and device: whole numbers, which float16 holds exactly. So the sum of all
differences holds every tree. The model's output is the sum over rounds of the mean of that round's trees.
"""

from __future__ import annotations

import numpy as np
import xgboost
from sklearn_forest import Sum  # noqa: F401

from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.partition import parse_part, parse_partition
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights

ROUNDS, MOST_BYTES = 8, 16384
PARAMETERS = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.5, "base_score": 0.5, "nthread": 1}


class Trees:
    """Is a digit 5 or more?"""

    def __init__(self, partition: str = "iid", part: str = "1/1", seed: int = 0) -> None:
        digits, (self._own, self._parts) = load_digits(), parse_part(part)
        mine = digits.train.take(
            parse_partition(partition).split(digits.train.labels, self._parts, seed)[self._own]
        )
        self._train = xgboost.DMatrix(mine.inputs.reshape(-1, 64), mine.labels >= 5)
        self._held_out = xgboost.DMatrix(digits.held_out.inputs.reshape(-1, 64), digits.held_out.labels >= 5)

    def initial_weights(self) -> Weights:
        return {"trees": np.zeros((ROUNDS, self._parts, MOST_BYTES), np.float16)}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        trees, place = weights["trees"].copy(), (max(1, job.round) - 1, self._own)
        self._train.set_base_margin(margin(trees[: place[0]], self._train))
        booster = xgboost.train(PARAMETERS | {"seed": job.seed}, self._train, num_boost_round=1)
        raw = np.frombuffer(booster.save_raw("ubj"), np.uint8)
        trees[place] = 0
        trees[place][: len(raw)] = raw
        return TrainResult({"trees": trees}, self._train.num_row(), 1)

    def evaluate(self, weights: Weights) -> EvalResult:
        right = (margin(weights["trees"], self._held_out) > 0) == self._held_out.get_label()
        return EvalResult(len(right), {"accuracy": float(right.mean())})


def margin(trees: np.ndarray, data: xgboost.DMatrix) -> np.ndarray:
    total = np.zeros(data.num_row(), np.float32)
    for of_round in trees:
        grown = [row.astype(np.uint8).tobytes().rstrip(b"\0") for row in of_round]
        boosters = [xgboost.Booster(model_file=bytearray(raw)) for raw in grown if raw]
        data.set_base_margin(np.zeros(data.num_row()))
        total += sum(each.predict(data, output_margin=True) for each in boosters) / max(1, len(boosters))
    return total

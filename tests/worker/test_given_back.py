"""Tasks that cannot be done: given back with the reason, and the worker goes on."""

import re

import numpy as np
import pytest
import torch

from fedgrpc.errors import (
    TaskError,
)
from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.v1 import round_pb2
from tests.support.fake_aggregator import FakeAggregator, model, train_task
from tests.support.running_worker import AddOneTrainer, run_against, spooled


class Raises(AddOneTrainer):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def train(self, weights, job):
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().train(weights, job)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("float\ndivision"), "ZeroDivisionError: float division"),
        (StopIteration(), "StopIteration"),
        (MemoryError(), "MemoryError"),
        (TaskError("task mine raised KeyError: 'x'"), "task mine raised KeyError"),
    ],
)
async def test_a_task_that_raises_is_given_back_with_one_line_and_the_worker_goes_on(tmp_path, error, reason):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1"), train_task("t2")]
    assert await run_against(peer, tmp_path, Raises(error)) == 0
    assert reason in peer.failures["t1"]
    assert "\n" not in peer.failures["t1"]
    assert peer.uploads["t2"].complete


class Returns(AddOneTrainer):
    def __init__(self, change, **counts):
        super().__init__()
        self.change, self.counts = change, counts

    def train(self, weights, job):
        result = super().train(weights, job)
        values = {"example_count": 64, "steps": 1, **self.counts}
        return TrainResult(self.change(dict(result.weights)), **values)


def _nan(weights):
    weights["weight"][3, 3] = np.nan
    return weights


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (Returns(_nan), "weight: .*NaN"),
        (Returns(lambda weights: {"weight": weights["weight"]}), "no tensor"),
        (Returns(lambda weights: {**weights, "bias": np.zeros(3, np.float32)}), "bias.*shape"),
        (Returns(lambda weights: weights, example_count=-5), "-5 as example_count"),
        (Returns(lambda weights: weights, example_count=0), "0 as example_count; .* from 1"),
    ],
)
async def test_a_training_result_that_cannot_be_sent_is_reported_and_not_sent(tmp_path, trainer, reason):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task()]
    assert await run_against(peer, tmp_path, trainer) == 0
    assert re.search(reason, peer.failures["t1"])
    assert peer.uploads == {}
    assert spooled(tmp_path) == []


class Gives(AddOneTrainer):
    """Returns anything at all from one of its methods."""

    def __init__(self, **given):
        super().__init__()
        self.given = given

    def initial_weights(self):
        return self.given.get("initial", model(42))

    def train(self, weights, job):
        return self.given["train"] if "train" in self.given else super().train(weights, job)

    def evaluate(self, weights):
        return self.given.get("scores")


@pytest.mark.parametrize(
    ("given", "kind", "reason"),
    [
        ({"train": None}, "TRAIN", "train() of the learning task returned nothing, not a TrainResult"),
        ({"train": (model(1), 3, 1)}, "TRAIN", "returned a tuple, not a TrainResult"),
        ({"train": TrainResult({"weight": [[1.0]]}, 3, 1)}, "TRAIN", "gave a list as weight 'weight'"),
        ({"train": TrainResult(model(1), None, 1)}, "TRAIN", "reports None as example_count"),
        ({"train": TrainResult(model(1), float("nan"), 1)}, "TRAIN", "reports nan as example_count"),
        ({"train": TrainResult(model(1), 10**30, 1)}, "TRAIN", "as example_count; it must be a whole number"),
        ({"train": TrainResult(model(1), 3, 1, {"loss": "low"})}, "TRAIN", "metric 'loss' of the learning task"),
        ({"train": TrainResult(model(1), 3, 1, {"f1": [0.1, 0.2]})}, "TRAIN", "metric 'f1' of the learning task"),
        ({"train": TrainResult(model(1), 3, 1, {"matrix": np.eye(2)})}, "TRAIN", "metric 'matrix'"),
        ({"train": TrainResult(model(1), 3, 1, None)}, "TRAIN", "not numbers by name"),
        ({"scores": 0.5}, "EVALUATE", "evaluate() of the learning task returned a float, not an EvalResult"),
        ({"initial": {"w": [1.0]}}, "INITIALIZE", "gave a list as weight 'w'; weights are NumPy arrays by name"),
        ({"initial": {3: np.zeros(2)}}, "INITIALIZE", "weights are NumPy arrays by name"),
        ({"initial": None}, "INITIALIZE", "gave nothing as weights"),
    ],
    ids=str,
)
async def test_a_learning_task_that_returns_the_wrong_thing_is_given_back_and_the_worker_goes_on(
    tmp_path, given, kind, reason
):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(kind=getattr(round_pb2, f"TASK_KIND_{kind}"))]
    assert await run_against(peer, tmp_path, Gives(**given)) == 0
    assert reason in peer.failures["t1"]
    assert peer.uploads == {}


async def test_scores_that_are_not_numbers_do_not_cost_the_update(tmp_path):
    class Diverged(AddOneTrainer):
        def evaluate(self, weights):
            return EvalResult(4, {"loss": float("nan"), "accuracy": 0.5})

    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(evaluate=True)]
    await run_against(peer, tmp_path, Diverged())
    assert peer.uploads["t1"].header.evaluation_metrics == {"accuracy": 0.5}


async def test_numbers_of_numpy_and_torch_and_scores_that_are_not_defined_are_metrics(tmp_path):
    class Scores(AddOneTrainer):
        def evaluate(self, weights):
            scores = {"a": np.float32(0.5), "b": np.array(0.25), "c": np.int64(3), "d": np.bool_(True), "e": None}
            return EvalResult(np.int64(4), scores | {"f": torch.tensor(0.75)})

    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(evaluate=True)]
    await run_against(peer, tmp_path, Scores())
    told = peer.uploads["t1"].header.evaluation_metrics
    assert dict(told) == {"a": 0.5, "b": 0.25, "c": 3.0, "d": 1.0, "f": 0.75}


async def test_scores_of_no_examples_are_none(tmp_path):
    class Empty(AddOneTrainer):
        def evaluate(self, weights):
            return EvalResult(0, {"loss": float("nan"), "accuracy": 0.0})

    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(evaluate=True)]
    await run_against(peer, tmp_path, Empty())
    assert not peer.uploads["t1"].header.evaluation_metrics


async def test_an_evaluator_without_data_says_so(tmp_path):
    class Blind(AddOneTrainer):
        def evaluate(self, weights):
            return None

    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(kind=round_pb2.TASK_KIND_EVALUATE)]
    await run_against(peer, tmp_path, Blind())
    assert "held-out" in peer.failures["t1"]


async def test_a_kind_of_task_from_the_future_is_given_back(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task(kind=99)]
    assert await run_against(peer, tmp_path) == 0
    assert "update fedgrpc" in peer.failures["t1"]

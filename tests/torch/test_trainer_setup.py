"""What a TorchTask's trainer is given: its share of the data, its settings; what is refused, in which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.errors import TaskError, UsageError
from fedgrpc.torch.task import TorchTask
from fedgrpc.trainer import TrainJob
from tests.torch.plain import ByItem, Plain, X, Y, trainer_of


def test_shares_of_all_parts_are_the_whole_data() -> None:
    trainers = [trainer_of(Plain, partition="dirichlet:0.5", part=f"{part}/3", seed=2) for part in (1, 2, 3)]
    weights = trainers[0].initial_weights()
    assert sum(trainer.train(weights, TrainJob()).example_count for trainer in trainers) == 70
    scores = [score for trainer in trainers if (score := trainer.evaluate(weights)) is not None]
    whole = trainer_of(Plain).evaluate(weights)
    assert whole is not None
    mean = sum(score.example_count * score.metrics["accuracy"] for score in scores) / 20
    assert mean == pytest.approx(whole.metrics["accuracy"])


def test_a_dataset_of_items_is_shared_out_by_its_labels() -> None:
    trainers = [trainer_of(ByItem, partition="shards:1", part=f"{part}/2") for part in (1, 2)]
    counts = [trainer.train(trainer.initial_weights(), TrainJob()).example_count for trainer in trainers]
    assert counts == [35, 35]


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"device": "tpu0"}, "no device 'tpu0'"),
        ({"device": "cuda:99"}, "finds"),
        ({"model": "lenet"}, "takes no --model"),
        ({"threads": 0}, "threads must be"),
        ({"options": {"widht": "3"}}, "takes no option 'widht'"),
        ({"partition": "iid", "part": "1/71"}, "cannot be shared out"),
        ({"partition": "x", "part": "1/2"}, "partition 'x'"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(setup: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer_of(Plain, **setup)


ONE_SET = TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("data", ONE_SET, r"Bent.data\(\) must return two data sets .*; it returned a TensorDataset"),
        ("data", (None, None), "must return two data sets"),
        ("data", (ONE_SET, 0.5), "what to score with must be a data set, a DataLoader or None"),
        ("model", None, r"Bent.model\(\) must return a torch.nn.Module, not a NoneType"),
    ],
)
def test_a_task_that_returns_something_else_is_told_what_to_return(
    method: str, returned: object, message: str
) -> None:
    bent = type("Bent", (Plain,), {method: lambda *_: returned})
    with pytest.raises(TaskError, match=message):
        trainer_of(bent)


def test_threads_are_set_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    trainer_of(Plain, threads=2)
    assert asked == [2]


def test_no_data_at_all_is_a_usage_error() -> None:
    class Empty(Plain):
        def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
            return TensorDataset(X[:0], Y[:0]), None

    with pytest.raises(UsageError, match=r"Empty.data\(\) gives no examples"):
        trainer_of(Empty)


def test_held_out_data_alone_is_enough_to_score_and_not_to_train() -> None:
    class ScoresOnly(Plain):
        def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
            return TensorDataset(X[:0], Y[:0]), TensorDataset(X, Y)

    trainer = trainer_of(ScoresOnly)
    result = trainer.evaluate(trainer.initial_weights())
    assert result is not None
    assert result.example_count == 90
    with pytest.raises(UsageError, match="no training examples"):
        trainer.train(trainer.initial_weights(), TrainJob())


@pytest.mark.parametrize("method", ["model", "data"])
def test_a_task_that_lacks_a_method_says_which(method: str) -> None:
    class Partial(Plain):
        pass

    original: Callable[..., Any] = getattr(TorchTask, method)
    setattr(Partial, method, original)
    with pytest.raises(NotImplementedError, match=rf"Partial does not define {method}\(\)"):
        trainer_of(Partial)

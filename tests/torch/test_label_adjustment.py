"""Logit adjustment: a worker does not teach how frequent its labels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.errors import TaskError
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, Pruning, Quantization
from fedgrpc.torch.label_adjustment import LabelAdjustment
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob

COUNTS = (40, 25, 5, 0)
LABELS = np.repeat(np.arange(4), COUNTS)
X = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
BALANCED = TrainJob(batch_size=70, learning_rate=0.3, momentum=0.0, label_adjustment=1.0)


class Linear(TorchTask):
    """Four classes, of which one has no examples here."""

    def model(self) -> nn.Module:
        return nn.Linear(3, 4)

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return TensorDataset(X, torch.from_numpy(LABELS)), None


class Deep(Linear):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))


class Regression(Linear):
    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return TensorDataset(X, X.sum(1, keepdim=True)), None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def trainer_of(task: type[TorchTask]) -> TorchTrainer:
    return TorchTrainer(task(), TaskSetup(device="cpu", seed=1))


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_a_step_is_that_of_cross_entropy_with_the_log_shares_added(tau: float) -> None:
    trainer = trainer_of(Linear)
    start = trainer.initial_weights()
    job = TrainJob(batch_size=70, learning_rate=0.3, momentum=0.0, label_adjustment=tau)
    trained = trainer.train(start, job).weights
    shares = np.maximum(np.array(COUNTS) / 70, 1e-8)
    logits = X.numpy() @ start["weight"].T + start["bias"] + tau * np.log(shares)
    error = np.exp(logits)
    error /= error.sum(1, keepdims=True)
    error[np.arange(70), LABELS] -= 1
    np.testing.assert_allclose(trained["weight"], start["weight"] - 0.3 * error.T @ X.numpy() / 70, atol=1e-6)
    np.testing.assert_allclose(trained["bias"], start["bias"] - 0.3 * error.mean(0), atol=1e-6)


def test_frequent_labels_alone_teach_nothing() -> None:
    """A model that tells no labels apart is right already, however many examples there are of each."""
    trainer = trainer_of(Linear)
    blank = {name: np.zeros_like(array) for name, array in trainer.initial_weights().items()}
    plain = trainer.train(blank, TrainJob(batch_size=70, learning_rate=0.3, momentum=0.0)).weights
    assert plain["bias"][0] > 0.08 > -0.07 > plain["bias"][3]
    balanced = trainer.train(blank, BALANCED).weights
    np.testing.assert_allclose(balanced["bias"], 0, atol=1e-7)


def test_a_label_that_is_not_here_is_not_unlearned() -> None:
    trainer = trainer_of(Linear)
    start = trainer.initial_weights()
    steps = {"batch_size": 10, "learning_rate": 0.3, "epochs": 20.0}
    plain = trainer.train(start, TrainJob(**steps)).weights  # type: ignore[arg-type]
    balanced = trainer.train(start, TrainJob(**steps, label_adjustment=1.0)).weights  # type: ignore[arg-type]
    assert plain["bias"][3] < start["bias"][3] - 1
    np.testing.assert_allclose(balanced["bias"][3], start["bias"][3], atol=1e-3)


@pytest.mark.parametrize(
    "plan",
    [
        LocalModelPlan(pruning=Pruning(0.3)),
        LocalModelPlan(quantization=Quantization(8, 8)),
        LocalModelPlan(nested=(0.5,)),
        LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
        LocalModelPlan(arithmetic=Arithmetic("float8_e5m2")),
    ],
    ids=lambda plan: plan.to_toml().replace("\n", " "),
)
def test_a_compressed_local_model_is_trained_with_it_too(plan: LocalModelPlan) -> None:
    """In every arithmetic, and in the narrower models within it."""
    trainer = trainer_of(Deep)
    start = trainer.initial_weights()

    def moved(tau: float) -> float:
        job = TrainJob(batch_size=10, learning_rate=0.3, epochs=5, local_model=plan, label_adjustment=tau)
        result = trainer.train(start, job)
        assert result.start is not None
        return abs(float(result.weights["2.bias"][3] - result.start["2.bias"][3]))

    assert moved(1.0) < 0.1 * moved(0.0)


def test_targets_that_are_no_class_indices_are_refused() -> None:
    trainer = trainer_of(Regression)
    with pytest.raises(TaskError, match="targets are class indices"):
        trainer.train(trainer.initial_weights(), BALANCED)


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 4)])
def test_outputs_that_are_no_logits_of_its_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match="3 classes or more"):
        LabelAdjustment(LABELS, 1.0)(torch.zeros(shape))

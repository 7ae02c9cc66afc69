"""A task without code for sub-models and local models trains both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import (
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Pruning,
    Quantization,
)
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import SliceableTrainer, TaskSetup, TrainJob, Weights

JOB = TrainJob(epochs=4, batch_size=16, learning_rate=0.1, seed=3)


class Blobs(TorchTask):
    """Three clouds of points, told apart by a module of the user's own."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def data(self, path: Path | None) -> tuple[TensorDataset, TensorDataset]:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(240) % 3
        points = torch.randn(240, 6, generator=generator) + 2 * torch.eye(3, 6)[labels]
        return TensorDataset(points[:180], labels[:180]), TensorDataset(points[180:], labels[180:])


@pytest.fixture
def trainer() -> TorchTrainer:
    torch.set_num_threads(1)
    return Blobs.build_trainer(TaskSetup(device="cpu"))


def sliced(trainer: TorchTrainer, sub_model: SubModel) -> Weights:
    selection = trainer.channels().select(sub_model)
    whole = trainer.initial_weights()
    return {name: selection.coverage(name, array.shape).take(array).copy() for name, array in whole.items()}


def test_a_torch_trainer_is_sliceable(trainer: TorchTrainer) -> None:
    assert isinstance(trainer, SliceableTrainer)
    assert [group.channels for group in trainer.channels().groups] == [32, 16]


@pytest.mark.parametrize("width", [0.5, 0.25])
def test_weights_of_a_sub_model_train_a_narrower_model(trainer: TorchTrainer, width: float) -> None:
    weights = sliced(trainer, SubModel(width, "random", 1))
    before = trainer.evaluate(weights)
    result = trainer.train(weights, JOB)
    after = trainer.evaluate(result.weights)
    assert before is not None
    assert after is not None
    assert {name: array.shape for name, array in result.weights.items()} == {
        name: array.shape for name, array in weights.items()
    }
    assert after.metrics["accuracy"] > max(0.6, before.metrics["accuracy"])
    assert result.start is None


def test_the_whole_model_trains_as_if_no_sub_model_had_been(trainer: TorchTrainer) -> None:
    whole = trainer.initial_weights()
    fresh = Blobs.build_trainer(TaskSetup(device="cpu")).train(whole, JOB)
    trainer.train(sliced(trainer, SubModel(0.5)), JOB)
    again = trainer.train(whole, JOB)
    assert all(np.array_equal(again.weights[name], array) for name, array in fresh.weights.items())


def test_weights_of_no_sub_model_are_refused(trainer: TorchTrainer) -> None:
    narrow = dict(sliced(trainer, SubModel(0.5)))
    with pytest.raises(LayoutError, match="no sub-model of it"):
        trainer.evaluate({**narrow, "3.weight": narrow["3.weight"][:, :-1]})
    with pytest.raises(LayoutError, match="no sub-model of it"):
        trainer.evaluate({**narrow, "5.weight": narrow["5.weight"][:2]})
    with pytest.raises(LayoutError, match="no sub-model of it"):
        trainer.evaluate({**narrow, "0.weight": np.zeros((64, 6), np.float32)})
    with pytest.raises(LayoutError):
        trainer.evaluate({name: array for name, array in narrow.items() if name != "0.bias"})


PLANS = [
    LocalModelPlan(pruning=Pruning(0.5)),
    LocalModelPlan(clustering=Clustering(8, ("3.*",))),
    LocalModelPlan(quantization=Quantization(8, 8)),
    LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
    LocalModelPlan(arithmetic=Arithmetic("float8_e5m2", "stochastic")),
    LocalModelPlan(
        pruning=Pruning(0.5),
        clustering=Clustering(8, ("3.*",)),
        quantization=Quantization(8),
        arithmetic=Arithmetic("float24"),
    ),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.to_toml())
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_a_compressed_local_model_starts_where_its_update_is_counted_from(
    trainer: TorchTrainer, plan: LocalModelPlan, width: float
) -> None:
    weights = sliced(trainer, SubModel(width))
    given = {name: array.copy() for name, array in weights.items()}
    nothing = TrainJob(epochs=1, batch_size=16, learning_rate=0.0, momentum=0.0, seed=3, local_model=plan)
    result = trainer.train(weights, nothing)
    assert result.start is not None
    for name, array in result.weights.items():
        assert array.dtype == weights[name].dtype
        assert np.array_equal(array, result.start[name])
        assert np.array_equal(weights[name], given[name])
    assert any(not np.array_equal(array, weights[name]) for name, array in result.start.items())


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.to_toml())
def test_a_compressed_local_model_learns_and_says_how_well(trainer: TorchTrainer, plan: LocalModelPlan) -> None:
    job = TrainJob(epochs=4, batch_size=16, learning_rate=0.1, seed=3, local_model=plan)
    result = trainer.train(trainer.initial_weights(), job)
    assert result.metrics["local_accuracy"] > 0.5
    for name, mask in result.masks.items():
        assert not result.weights[name][~mask].any()
    for name in result.clustered:
        assert result.start is not None
        kept = result.masks.get(name, np.ones(result.weights[name].shape, bool))
        moved = (result.weights[name] - result.start[name])[kept]
        assert len(np.unique(moved)) <= 8


def test_training_a_compressed_model_leaves_the_next_job_alone(trainer: TorchTrainer) -> None:
    whole = trainer.initial_weights()
    fresh = Blobs.build_trainer(TaskSetup(device="cpu")).train(whole, JOB)
    for plan in PLANS:
        trainer.train(whole, TrainJob(epochs=1, seed=3, local_model=plan))
    again = trainer.train(whole, JOB)
    assert all(np.array_equal(again.weights[name], array) for name, array in fresh.weights.items())


class NotTraceable(Blobs):
    def model(self) -> nn.Module:
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.first(x).cumsum(1))  # type: ignore[no-any-return]

        return Fixed()


def test_a_model_that_cannot_be_sliced_keeps_its_width() -> None:
    trainer = NotTraceable.build_trainer(TaskSetup(device="cpu"))
    assert trainer.channels().groups == ()
    assert all(
        array.shape == trainer.initial_weights()[name].shape
        for name, array in sliced(trainer, SubModel(0.5)).items()
    )


def test_a_plan_with_nested_widths_makes_the_prefix_learn_what_the_whole_model_learns(
    trainer: TorchTrainer,
) -> None:
    """After training the whole model alone, its prefix is worth little; trained along, it is as good."""

    def accuracies(plan: LocalModelPlan | None) -> tuple[float, float]:
        job = TrainJob(epochs=8, batch_size=16, learning_rate=0.1, seed=3, local_model=plan)
        trained = trainer.train(trainer.initial_weights(), job).weights
        selection = trainer.channels().select(SubModel(0.25))
        prefix = {name: selection.coverage(name, array.shape).take(array) for name, array in trained.items()}
        scores = [trainer.evaluate(weights) for weights in (trained, prefix)]
        return scores[0].metrics["accuracy"], scores[1].metrics["accuracy"]  # type: ignore[union-attr]

    _, alone = accuracies(None)
    whole, along = accuracies(LocalModelPlan(nested=(0.5, 0.25)))
    assert along > alone + 0.1
    assert along > whole - 0.1


class Stubborn(Blobs):
    """Its own code counts on its sizes, which only running it shows."""

    def model(self) -> nn.Module:
        class Checked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = self.a(x)
                if x.shape[1] != 8:
                    raise ValueError("eight, please")
                return self.b(x)  # type: ignore[no-any-return]

        return Checked()


def test_a_model_that_does_not_run_narrower_says_so_and_has_no_channels() -> None:
    trainer = Stubborn.build_trainer(TaskSetup(device="cpu"))
    with pytest.raises(UsageError, match="a narrower Checked does not run: eight, please"):
        trainer.channels()


def test_what_is_kept_whole_at_every_width_is_told(trainer: TorchTrainer) -> None:
    class Viewing(Blobs):
        def model(self) -> nn.Module:
            class Fixed(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

                def forward(self, x: Tensor) -> Tensor:
                    return self.b(self.a(x).view(-1, 8))  # type: ignore[no-any-return]

            return Fixed()

    ((names, reason),) = Viewing.build_trainer(TaskSetup(device="cpu")).full_width_tensors()
    assert names == ["a.weight", "a.bias"]
    assert "view()" in reason
    assert trainer.full_width_tensors() == []


def test_masks_are_made_anew_from_the_weights_of_each_round(trainer: TorchTrainer) -> None:
    """PruneFL (arXiv 1909.12326): what others have made large comes back."""
    job = replace(JOB, local_model=LocalModelPlan(pruning=Pruning(0.5)))
    weights = trainer.initial_weights()
    pruned = ~trainer.train(weights, job).masks["0.weight"]
    grown = {**weights, "0.weight": np.where(pruned, 1.0, 1e-3).astype(np.float32)}
    assert np.array_equal(trainer.train(grown, job).masks["0.weight"], pruned)


def noise_of(trainer: TorchTrainer, plan: LocalModelPlan) -> float:
    return trainer.train(trainer.initial_weights(), replace(JOB, local_model=plan)).noise_ratio


def test_the_noise_of_an_emulated_format_is_measured_against_the_same_steps_in_float32(
    trainer: TorchTrainer,
) -> None:
    exact = noise_of(trainer, LocalModelPlan(arithmetic=Arithmetic("float32", emulated=True)))
    fine = noise_of(trainer, LocalModelPlan(arithmetic=Arithmetic("bfloat16", emulated=True)))
    coarse = noise_of(trainer, LocalModelPlan(arithmetic=Arithmetic("fixed8.5", "stochastic")))
    assert exact < 1e-9 < fine < 0.5 < 2 < coarse


def test_what_a_plan_does_besides_its_format_is_no_noise(trainer: TorchTrainer) -> None:
    exact = Arithmetic("float32", emulated=True)
    plan = LocalModelPlan(pruning=Pruning(0.5), clustering=Clustering(8), arithmetic=exact)
    assert noise_of(trainer, plan) < 1e-9
    assert noise_of(trainer, LocalModelPlan(pruning=Pruning(0.5))) == 0


def test_measuring_the_noise_changes_nothing_of_the_update(trainer: TorchTrainer, monkeypatch) -> None:
    job = replace(JOB, local_model=LocalModelPlan(arithmetic=Arithmetic("fixed8.5", "stochastic")))
    measured = trainer.train(trainer.initial_weights(), job)
    monkeypatch.setattr(TorchTrainer, "_noise", lambda *_: 0.0)
    alone = trainer.train(trainer.initial_weights(), job)
    assert all(np.array_equal(measured.weights[name], alone.weights[name]) for name in alone.weights)
    assert measured.noise_ratio > alone.noise_ratio == 0

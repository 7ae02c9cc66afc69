"""Learning tasks whose batches are no pairs of tensors: dicts, collated items, DataLoaders, steps of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

from fedgrpc.errors import TaskError, UsageError
from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan, Memory
from fedgrpc.trainer import Cancelled, TrainJob, for_part
from tests.torch.plain import Items, Plain, X, Y, equal, trainer_of

JOB = TrainJob(max_steps=3)


class Dicts(Dataset[Any]):
    """The first `count` examples as dicts, as tokenizers of Hugging Face make them."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return {"inputs_embeds": X[index], "attention_mask": torch.ones(4), "labels": int(Y[index])}


class Named(nn.Module):
    """A model that is called by keyword and gives outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Plain().model()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"hidden": inputs_embeds, "logits": self.layers(inputs_embeds * attention_mask)}


class Tokens(Plain):
    def model(self) -> nn.Module:
        return Named()

    def data(self, path: Path | None) -> Any:
        return Dicts(70), Dicts(90)


def renamed(weights: Any) -> dict[str, np.ndarray]:
    return {name.removeprefix("layers."): array for name, array in weights.items()}


def test_items_that_are_dicts_train_and_score_as_pairs_do() -> None:
    pairs, dicts = trainer_of(Plain), trainer_of(Tokens)
    start, named = pairs.initial_weights(), dicts.initial_weights()
    assert equal(start, renamed(named))
    trained = dicts.train(named, JOB).weights
    assert equal(pairs.train(start, JOB).weights, renamed(trained))
    found = dicts.evaluate(trained)
    assert found is not None
    assert found.example_count == 90
    assert set(found.metrics) == {"loss", "accuracy"}


def test_dicts_are_shared_out_by_their_labels() -> None:
    parts = [trainer_of(Tokens, partition="labels:1", part=f"{part}/2") for part in (1, 2)]
    counts = [trainer.train(trainer.initial_weights(), JOB).example_count for trainer in parts]
    assert sum(counts) == 70


@pytest.mark.parametrize(
    "plan", [LocalModelPlan(memory=Memory(micro_batches=3)), LocalModelPlan(arithmetic=Arithmetic("bfloat16"))]
)
def test_dicts_go_through_local_models(plan: LocalModelPlan) -> None:
    trainer = trainer_of(Tokens)
    result = trainer.train(trainer.initial_weights(), TrainJob(max_steps=2, local_model=plan))
    assert "local_accuracy" in result.metrics


def test_nested_widths_are_refused_for_dicts() -> None:
    trainer = trainer_of(Tokens)
    with pytest.raises(UsageError, match="several tensors"):
        trainer.train(trainer.initial_weights(), TrainJob(local_model=LocalModelPlan(nested=(0.5,))))


class Ragged(Plain):
    """Texts of unequal lengths, padded by batch."""

    def model(self) -> nn.Module:
        return nn.EmbeddingBag(10, 2, padding_idx=0)

    def data(self, path: Path | None) -> Any:
        items = [(list(range(1, 2 + index % 5)), index % 2) for index in range(40)]
        return items, items

    def collate(self, items: list[Any]) -> Any:
        longest = max(len(tokens) for tokens, _ in items)
        padded = [tokens + [0] * (longest - len(tokens)) for tokens, _ in items]
        return torch.tensor(padded), torch.tensor([label for _, label in items])


def test_items_of_unequal_lengths_are_collated_as_the_task_says() -> None:
    trainer = trainer_of(Ragged)
    result = trainer.train(trainer.initial_weights(), TrainJob(epochs=1))
    assert result.steps == 4
    assert trainer.evaluate(result.weights) is not None


class Triples(Plain):
    def data(self, path: Path | None) -> Any:
        return TensorDataset(X[:70], torch.ones(70), Y[:70]), None

    def inputs_and_targets(self, batch: Any) -> Any:
        inputs, weights, targets = batch
        return inputs, (targets, weights)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        labels, weights = targets
        return (functional.cross_entropy(outputs, labels, reduction="none") * weights).mean()


def test_a_task_takes_batches_of_three_apart_itself() -> None:
    trainer, pairs = trainer_of(Triples), trainer_of(Plain)
    start = trainer.initial_weights()
    ours, theirs = trainer.train(start, JOB).weights, pairs.train(start, JOB).weights
    assert all(np.allclose(ours[name], theirs[name], atol=1e-6) for name in start)


class Loaded(Plain):
    def data(self, path: Path | None) -> Any:
        train = DataLoader(Items(70), batch_size=20, shuffle=True)
        return train, DataLoader(TensorDataset(X[70:], Y[70:]), batch_size=8)


def test_a_loader_gives_its_own_batches_whatever_the_plan_says() -> None:
    trainer = trainer_of(Loaded)
    start = trainer.initial_weights()
    first, again = (trainer.train(start, TrainJob(epochs=2, batch_size=5, seed=3)) for _ in range(2))
    assert (first.steps, first.example_count) == (8, 70)
    assert equal(first.weights, again.weights)
    assert not equal(first.weights, trainer.train(start, TrainJob(epochs=2, seed=4)).weights)
    scores = trainer.evaluate(start)
    assert scores is not None
    expected = trainer_of(Plain).evaluate(start)
    assert expected is not None
    assert scores.metrics == pytest.approx(expected.metrics)


def test_training_on_a_loader_stops_between_batches() -> None:
    steps: list[int] = []
    trainer = trainer_of(Loaded)
    start = trainer.initial_weights()
    job = TrainJob(epochs=9, stop=lambda: len(steps) >= 2, report=lambda done, total: steps.append(total))
    with pytest.raises(Cancelled):
        trainer.train(start, job)
    assert steps == [36, 36]


def test_a_loader_is_shared_out_unless_its_sampler_is_its_own() -> None:
    parts = [trainer_of(Loaded, partition="iid", part=f"{part}/2") for part in (1, 2)]
    results = [trainer.train(trainer.initial_weights(), TrainJob(epochs=1)) for trainer in parts]
    assert [(result.steps, result.example_count) for result in results] == [(2, 35), (2, 35)]

    class Weighted(Plain):
        def data(self, path: Path | None) -> Any:
            sampler = WeightedRandomSampler([1.0] * 70, 30)
            return DataLoader(Items(70), batch_size=10, sampler=sampler), None

    assert trainer_of(Weighted).train(trainer_of(Plain).initial_weights(), TrainJob(epochs=1)).steps == 3
    with pytest.raises(UsageError, match="sampler of its own"):
        trainer_of(Weighted, partition="iid", part="1/2")


class OwnStep(Plain):
    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        return functional.cross_entropy(model(inputs), targets)

    def scoring_step(self, model: nn.Module, inputs: Any, targets: Any) -> dict[str, Tensor]:
        return {"margin": model(inputs).abs().mean()}


def test_a_training_step_of_the_task_takes_the_place_of_forward_and_loss() -> None:
    ours, theirs = trainer_of(OwnStep), trainer_of(Plain)
    start = theirs.initial_weights()
    assert equal(ours.train(start, JOB).weights, theirs.train(start, JOB).weights)
    scores = ours.evaluate(start)
    assert scores is not None
    assert set(scores.metrics) == {"margin"}


def test_a_training_step_of_the_task_refuses_what_it_would_pass_by() -> None:
    trainer = trainer_of(OwnStep)
    start = trainer.initial_weights()
    with pytest.raises(UsageError, match="leaves a number format out"):
        trainer.train(start, TrainJob(local_model=LocalModelPlan(arithmetic=Arithmetic("bfloat16"))))
    with pytest.raises(UsageError, match="leaves label adjustment out"):
        trainer.train(start, TrainJob(label_adjustment=1.0))
    narrow = LocalModelPlan(memory=Memory(micro_batches=2))
    assert trainer.train(start, TrainJob(max_steps=1, local_model=narrow)).steps == 1


def test_a_training_step_that_gives_no_loss_is_told() -> None:
    task = type("Broken", (Plain,), {"training_step": lambda *_: None})
    trainer = trainer_of(task)
    with pytest.raises(TaskError, match=r"training_step\(\) must return the mean loss"):
        trainer.train(trainer.initial_weights(), JOB)


class Doubled(TensorDataset):
    """Makes more of its tensors, as one that augments images does."""

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target


class DoubledRows(Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class OwnTensors(Plain):
    def data(self, path: Path | None) -> Any:
        return Doubled(X[:70], Y[:70]), None


class OwnSubset(Plain):
    def data(self, path: Path | None) -> Any:
        return DoubledRows(TensorDataset(X, Y), range(70)), None


class OwnCollation(Plain):
    def data(self, path: Path | None) -> Any:
        return Subset(TensorDataset(X, Y), range(70)), None

    def collate(self, items: list[Any]) -> Any:
        inputs, targets = super().collate(items)
        return 2 * inputs, targets


class Twice(Plain):
    def data(self, path: Path | None) -> Any:
        return TensorDataset(2 * X[:70], Y[:70]), None


@pytest.mark.parametrize("partition", [None, "iid", "labels:1"])
@pytest.mark.parametrize("task", [OwnTensors, OwnSubset, OwnCollation])
def test_what_a_task_makes_of_its_tensors_item_by_item_is_trained_on(
    task: type[Plain], partition: str | None
) -> None:
    trainers = [trainer_of(each) for each in (task, Twice)]
    if partition is not None:
        trainers = [for_part(trainer, partition, "2/2") for trainer in trainers]
    start = trainer_of(Twice).initial_weights()
    assert equal(*(trainer.train(start, JOB).weights for trainer in trainers))


class InPlace(Plain):
    """A model that changes what it is given."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))


@pytest.mark.parametrize("part", ["1/2", "2/2"])
def test_a_model_that_changes_its_inputs_leaves_the_data_of_all_parts_alone(part: str) -> None:
    kept = X.clone()
    trainer = for_part(trainer_of(InPlace), "iid", part)
    trainer.evaluate(trainer.train(trainer.initial_weights(), JOB).weights)
    assert torch.equal(X, kept)

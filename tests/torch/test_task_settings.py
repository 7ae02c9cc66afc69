"""Schedules, class weights, mixed precision, memory, whole-set scores and frozen tensors of a `TorchTask`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedgrpc.codec.layout import TensorRole
from fedgrpc.errors import UsageError
from fedgrpc.torch.optimizer import in_round
from fedgrpc.torch.scores import auc, f1_score
from fedgrpc.trainer import TrainJob, Weights
from tests.torch.plain import Linear, Normalized, Plain, X, Y, equal, trainer_of

ONE = TrainJob(max_steps=1, batch_size=70, round=1)


def moved(start: Weights, after: Weights) -> np.ndarray:
    return np.concatenate([(after[name] - start[name]).reshape(-1) for name in start])


class Halved(Linear):
    """The learning rate halves with each round, and rises within the round."""

    def schedule(self, round: int, step: int, steps: int) -> float:
        return 0.5 ** (round - 1) * (step + 1) / steps


def test_the_rate_follows_the_schedule_of_rounds_and_steps() -> None:
    plain, ours = trainer_of(Linear), trainer_of(Halved)
    start = plain.initial_weights()
    step = moved(start, plain.train(start, ONE).weights)
    third = moved(start, ours.train(start, TrainJob(max_steps=1, batch_size=70, round=3)).weights)
    np.testing.assert_allclose(third, step / 4, rtol=1e-3, atol=1e-6)
    # Two steps of a quarter and of half the rate, the gradient being nearly the same.
    two = moved(start, ours.train(start, TrainJob(max_steps=2, epochs=2, batch_size=70, round=2)).weights)
    np.testing.assert_allclose(two, step * 0.75, rtol=0.2, atol=2e-3)


def test_a_schedule_changes_the_rate_of_torchs_optimizers() -> None:
    class Torchs(Halved):
        def optimizer(self, parameters: Any, learning_rate: float, momentum: float, weight_decay: float) -> Any:
            return torch.optim.SGD(parameters, learning_rate)

    ours, theirs = trainer_of(Halved), trainer_of(Torchs)
    start, job = ours.initial_weights(), TrainJob(epochs=1, round=2)
    for name, array in ours.train(start, job).weights.items():
        np.testing.assert_allclose(array, theirs.train(start, job).weights[name], atol=1e-6)


class Scheduled(Linear):
    """A scheduler of torch that counts rounds."""

    def optimizer_for(self, model: nn.Module, round: int) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return in_round(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1), round)


def test_a_scheduler_of_torch_counts_rounds_on_devices_that_missed_some() -> None:
    plain, ours = trainer_of(Linear), trainer_of(Scheduled)
    start = plain.initial_weights()
    step = moved(start, plain.train(start, ONE).weights)
    for round_, factor in ((1, 1), (2, 1), (3, 0.1), (5, 0.01)):
        after = ours.train(start, TrainJob(max_steps=1, batch_size=70, round=round_, learning_rate=9)).weights
        np.testing.assert_allclose(moved(start, after), step * factor, rtol=1e-2, atol=1e-6)


def test_bytes_of_tensors_are_those_of_each_batch_size_and_momentum_whatever_was_trained_before() -> None:
    jobs = [TrainJob(max_steps=1, batch_size=size, momentum=rate) for size in (70, 16) for rate in (0.9, 0.0)]
    used = trainer_of(Linear)
    start = used.initial_weights()
    fresh = [trainer_of(Linear).train(start, job).tensor_bytes for job in jobs]
    assert len(set(fresh)) == len(jobs)
    for _ in range(2):
        assert [used.train(start, job).tensor_bytes for job in jobs] == fresh


class Growing(Linear):
    """An optimizer without state in the first round, and with state in later ones."""

    def optimizer_for(self, model: nn.Module, round: int) -> Any:
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9 if round > 1 else 0.0)


def test_an_optimizer_of_the_tasks_own_is_counted_in_every_round() -> None:
    trainer = trainer_of(Growing)
    start = trainer.initial_weights()
    first, second = (trainer.train(start, TrainJob(max_steps=1, batch_size=70, round=round_)) for round_ in (1, 2))
    assert first.tensor_bytes < second.tensor_bytes


def weighted(weights: Any) -> type[Linear]:
    return type("Weighted", (Linear,), {"class_weights": weights})


def test_class_weights_are_those_of_cross_entropy_and_scores_are_without() -> None:
    module = nn.Linear(4, 2)
    start = trainer_of(Linear).initial_weights()
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in start.items()})
    counts = np.bincount(Y[:70].numpy())
    for asked, weights in (((1.0, 3.0), [1.0, 3.0]), ("balanced", 70 / (2 * counts))):
        trainer = trainer_of(weighted(asked))
        module.zero_grad()
        functional.cross_entropy(module(X[:70]), Y[:70], torch.tensor(weights).float()).backward()
        assert module.weight.grad is not None
        after = trainer.train(start, ONE).weights["weight"]
        np.testing.assert_allclose(after, start["weight"] - 0.1 * module.weight.grad.numpy(), atol=1e-6)
        assert trainer.evaluate(start) == trainer_of(Linear).evaluate(start)


@pytest.mark.parametrize(("weights", "message"), [((1.0, -1.0), "from 0"), ("equal", "balanced")])
def test_weights_that_are_none_are_refused(weights: Any, message: str) -> None:
    trainer = trainer_of(weighted(weights))
    with pytest.raises(UsageError, match=message):
        trainer.train(trainer.initial_weights(), ONE)


def test_class_weights_and_a_loss_of_its_own_are_refused() -> None:
    class Both(Linear):
        class_weights = (1.0, 2.0)

        def loss(self, outputs: Any, targets: Any) -> Tensor:
            return functional.cross_entropy(outputs, targets)

    trainer = trainer_of(Both)
    with pytest.raises(UsageError, match="class_weights"):
        trainer.train(trainer.initial_weights(), ONE)


def with_setting(base: type[Plain], **settings: Any) -> type[Plain]:
    return type("Set", (base,), settings)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole_in_less_memory() -> None:
    class Wide(Linear):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 2))

    whole, parts = trainer_of(Wide), trainer_of(with_setting(Wide, micro_batches=7))
    start = whole.initial_weights()
    first, second = whole.train(start, ONE), parts.train(start, ONE)
    np.testing.assert_allclose(moved(start, second.weights), moved(start, first.weights), atol=1e-6)
    assert second.tensor_bytes < first.tensor_bytes
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-4)


def test_checkpointed_blocks_give_the_same_result_in_less_memory() -> None:
    class Deep(Plain):
        def model(self) -> nn.Module:
            layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()) for _ in range(3)]
            return nn.Sequential(
                nn.Sequential(nn.Linear(4, 64), nn.Tanh()), *layers, nn.Sequential(nn.Linear(64, 2))
            )

    plain, ours = trainer_of(Deep), trainer_of(with_setting(Deep, checkpoint=True))
    start = plain.initial_weights()
    first, second = plain.train(start, ONE), ours.train(start, ONE)
    np.testing.assert_allclose(moved(start, second.weights), moved(start, first.weights), atol=1e-6)
    assert second.tensor_bytes < first.tensor_bytes


class Spied(Plain):
    seen: list[torch.dtype]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.seen.append(outputs.dtype)
        return functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_and_keeps_weights_in_32(name: str) -> None:
    task = with_setting(Spied, autocast=name, seen=[])
    plain, ours = trainer_of(Plain), trainer_of(task)
    start = plain.initial_weights()
    after = ours.train(start, TrainJob(epochs=3)).weights
    assert set(task.seen) == {getattr(torch, name)}  # type: ignore[attr-defined]
    assert {array.dtype.name for array in after.values()} == {"float32"}
    expected = moved(start, plain.train(start, TrainJob(epochs=3)).weights)
    assert np.linalg.norm(moved(start, after) - expected) < 0.05 * np.linalg.norm(expected)
    assert ours.evaluate(after) is not None


def test_an_unknown_precision_and_a_loss_scale_without_sgd_are_refused() -> None:
    class Adam(Plain):
        autocast = "float16"

        def optimizer(self, parameters: Any, *_: Any) -> Any:
            return torch.optim.Adam(parameters)

    for task, message in ((with_setting(Plain, autocast="int4"), "'bfloat16'"), (Adam, "goes with SGD")):
        trainer = trainer_of(task)
        with pytest.raises(UsageError, match=message):
            trainer.train(trainer.initial_weights(), ONE)


class Scored(Plain):
    batch_size = 4

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"f1": f1_score(outputs, targets), "auc": auc(outputs, targets), "seen": float(len(outputs))}


def test_scores_are_of_the_whole_set_and_no_mean_of_batches() -> None:
    trainer = trainer_of(Scored)
    weights = trainer.train(trainer.initial_weights(), TrainJob(epochs=1)).weights
    found = trainer.evaluate(weights)
    assert found is not None
    model = Plain().model()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    outputs = model.eval()(X[70:]).detach()
    assert found.metrics["seen"] == 20
    assert found.metrics["f1"] == pytest.approx(sklearn_f1(Y[70:], outputs.argmax(1), average="macro"))
    assert found.metrics["auc"] == pytest.approx(roc_auc_score(Y[70:], outputs[:, 1] - outputs[:, 0]))


@pytest.mark.parametrize("seed", range(5))
def test_f1_and_auc_are_those_of_scikit_learn_with_ties(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randint(-3, 4, (50, 3), generator=draw).float()
    targets = torch.randint(0, 3, (50,), generator=draw)
    assert f1_score(outputs, targets) == pytest.approx(sklearn_f1(targets, outputs.argmax(1), average="macro"))
    two = (targets > 0).long()
    assert auc(outputs[:, 0], two) == pytest.approx(roc_auc_score(two, outputs[:, 0]))
    assert math.isnan(auc(outputs[:, 0], torch.ones(50)))


class Head(Normalized):
    def trainable(self) -> list[str]:
        return ["3.*"]


def test_only_what_trainable_names_is_trained_and_the_rest_is_constant() -> None:
    trainer = trainer_of(Head)
    frozen = {name for name, role in trainer.roles().items() if role is TensorRole.CONSTANT}
    assert frozen == {"0.weight", "0.bias", "1.weight", "1.bias"}
    start = trainer.initial_weights()
    after = trainer.train(start, TrainJob(epochs=2)).weights
    # The statistics of the frozen BatchNorm stay, too.
    assert {name for name in start if not np.array_equal(start[name], after[name])} == {"3.weight", "3.bias"}
    assert equal(start, trainer_of(Normalized).initial_weights())


def test_a_name_that_is_no_tensor_is_told() -> None:
    with pytest.raises(UsageError, match=r"trainable\(\) names 'head.*'"):
        trainer_of(type("Wrong", (Plain,), {"trainable": lambda self: ["0.*", "head.*"]}))


class Augmented(Plain):
    def data(self, path: Path | None) -> Any:
        return TensorDataset(X, Y), TensorDataset(X, Y)

    def prepare(self, inputs: Any, training: bool) -> Any:
        return inputs + torch.randn_like(inputs) if training else inputs


def test_augmentation_is_drawn_from_the_jobs_seed_and_left_out_of_scores() -> None:
    trainer, plain = trainer_of(Augmented), trainer_of(Plain)
    start = trainer.initial_weights()
    first, again = (trainer.train(start, TrainJob(max_steps=2, seed=5)).weights for _ in range(2))
    assert equal(first, again)
    assert not equal(first, plain.train(start, TrainJob(max_steps=2, seed=5)).weights)
    assert trainer.evaluate(start) == trainer.evaluate(start)

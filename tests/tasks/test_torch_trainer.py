"""A TorchTask as a trainer: it is plain local training, repeatable, and can be stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.errors import LayoutError, TaskError, UsageError
from fedgrpc.tasks.torch_task import TorchTask
from fedgrpc.tasks.torch_trainer import TorchTrainer
from fedgrpc.worker.trainer import Cancelled, TaskSetup, TrainJob, Weights

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(90, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()


class Plain(TorchTask):
    learning_rate = 0.1
    batch_size = 10

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return TensorDataset(X[:70], Y[:70]), TensorDataset(X[70:], Y[70:])


class Items(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class ByItem(Plain):
    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return Items(70), None


class Normalized(Plain):
    """71 examples in batches of 10 leave a batch of one, on which BatchNorm raises."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        return TensorDataset(X[:71], Y[:71]), TensorDataset(X[71:], Y[71:])


class Linear(Plain):
    momentum = 0.0

    def model(self) -> nn.Module:
        return nn.Linear(4, 2)


def trainer_of(task: type[TorchTask], **setup: Any) -> TorchTrainer:
    return task.build_trainer(TaskSetup(**{"device": "cpu", **setup}))


def equal(first: Weights, second: Weights) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_one_epoch_is_what_a_plain_torch_loop_gives() -> None:
    """The reference is written out: the same order of batches, SGD with momentum, cross-entropy."""
    trainer, job = trainer_of(Plain), TrainJob(epochs=1, seed=5, round=2, learning_rate=0.05, momentum=0.5)
    start = trainer.initial_weights()
    trainer._model[2].p = 0.0  # type: ignore[index]
    model = Plain().model()
    model[2].p = 0.0  # type: ignore[index]
    model.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    order = np.random.default_rng((5, 2)).permutation(70)
    for first in range(0, 70, 10):
        batch = torch.from_numpy(order[first : first + 10])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = trainer.train(start, job)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(result.weights[name], tensor.numpy(), rtol=0, atol=1e-6)
    assert (result.example_count, result.steps) == (70, 7)


def test_training_repeats_bit_for_bit_whatever_ran_before() -> None:
    trainer, job = trainer_of(Plain), TrainJob(epochs=2, seed=1)
    start = trainer.initial_weights()
    first = trainer.train(start, job).weights
    trainer.train(first, TrainJob(seed=9))
    torch.rand(7)
    assert equal(first, trainer.train(start, job).weights)
    assert equal(first, trainer_of(Plain).train(start, job).weights)


def test_another_seed_or_round_trains_differently() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()
    base = trainer.train(start, TrainJob(seed=1)).weights
    assert not equal(base, trainer.train(start, TrainJob(seed=2)).weights)
    assert not equal(base, trainer.train(start, TrainJob(seed=1, round=1)).weights)


def test_initial_weights_are_the_same_on_every_worker_of_one_seed() -> None:
    assert equal(trainer_of(Plain).initial_weights(), trainer_of(Plain).initial_weights())
    assert not equal(trainer_of(Plain).initial_weights(), trainer_of(Plain, seed=1).initial_weights())


def test_training_leaves_its_input_and_the_global_random_state_alone() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()
    kept = {name: array.copy() for name, array in start.items()}
    state = torch.random.get_rng_state()
    trainer.train(start, TrainJob())
    assert equal(kept, start)
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_learns() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()
    before, after = trainer.evaluate(start), trainer.evaluate(trainer.train(start, TrainJob(epochs=20)).weights)
    assert before is not None
    assert after is not None
    assert after.metrics["loss"] < before.metrics["loss"]
    assert after.metrics["accuracy"] >= 0.9


def test_evaluation_is_the_mean_over_all_held_out_examples() -> None:
    trainer = trainer_of(Linear)
    weights = trainer.initial_weights()
    outputs = X[70:].numpy() @ weights["weight"].T + weights["bias"]
    result = trainer.evaluate(weights)
    assert result is not None
    assert result.example_count == 20
    assert result.metrics["accuracy"] == pytest.approx((outputs.argmax(1) == Y[70:].numpy()).mean())


def test_evaluation_in_many_batches_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(Plain)
    whole = trainer.evaluate(trainer.initial_weights())
    monkeypatch.setattr("fedgrpc.tasks.torch_trainer._EVALUATION_BATCH", 7)
    pieces = trainer.evaluate(trainer.initial_weights())
    assert whole is not None
    assert pieces is not None
    assert pieces.metrics == pytest.approx(whole.metrics)


def test_without_held_out_data_there_is_no_score() -> None:
    trainer = trainer_of(ByItem)
    assert trainer.evaluate(trainer.initial_weights()) is None


def test_a_dataset_of_items_trains_as_one_of_tensors() -> None:
    start, job = trainer_of(Plain).initial_weights(), TrainJob(epochs=2)
    assert equal(trainer_of(Plain).train(start, job).weights, trainer_of(ByItem).train(start, job).weights)


def test_one_full_batch_step_on_a_linear_model_is_the_closed_form() -> None:
    """w' = w - lr * X^T (softmax(Xw + b) - onehot(y)) / n."""
    trainer = trainer_of(Linear)
    start = trainer.initial_weights()
    result = trainer.train(start, TrainJob(batch_size=70, learning_rate=0.3))
    x, y = X[:70].double().numpy(), Y[:70].numpy()
    error = np.exp(x @ start["weight"].T + start["bias"])
    error /= error.sum(1, keepdims=True)
    error[np.arange(70), y] -= 1
    np.testing.assert_allclose(result.weights["weight"], start["weight"] - 0.3 * error.T @ x / 70, atol=1e-6)
    np.testing.assert_allclose(result.weights["bias"], start["bias"] - 0.3 * error.mean(0), atol=1e-6)


def test_the_proximal_term_adds_mu_times_the_distance_to_the_gradient() -> None:
    """FedProx: two full-batch steps, the second pulled back by mu (w1 - w0)."""
    trainer = trainer_of(Linear)
    w0 = trainer.initial_weights()
    job = TrainJob(batch_size=70, learning_rate=0.3)
    w1 = trainer.train(w0, job).weights
    w2 = trainer.train(w1, job).weights
    proximal = trainer.train(w0, TrainJob(batch_size=70, learning_rate=0.3, epochs=2, proximal_mu=0.5)).weights
    for name in w0:
        np.testing.assert_allclose(proximal[name], w2[name] - 0.3 * 0.5 * (w1[name] - w0[name]), atol=1e-6)


def test_a_strong_proximal_term_stays_near_the_start() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()

    def moved(mu: float) -> float:
        trained = trainer.train(start, TrainJob(epochs=5, learning_rate=0.02, proximal_mu=mu)).weights
        return float(sum(np.square(trained[name] - start[name]).sum() for name in start))

    assert moved(10.0) < moved(1.0) < moved(0.0)


def test_weight_decay_shrinks() -> None:
    trainer = trainer_of(Linear)
    start = trainer.initial_weights()
    plain = trainer.train(start, TrainJob(batch_size=70, learning_rate=0.3)).weights
    decayed = trainer.train(start, TrainJob(batch_size=70, learning_rate=0.3, weight_decay=0.1)).weights
    expected = plain["weight"] - 0.03 * start["weight"]
    np.testing.assert_allclose(decayed["weight"], expected, atol=1e-6)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_the_default_optimizer_is_torchs_sgd_bit_for_bit(momentum: float, weight_decay: float) -> None:
    class Torchs(Plain):
        def optimizer(
            self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
        ) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True
            )

    job = TrainJob(epochs=3, momentum=momentum, weight_decay=weight_decay)
    start = trainer_of(Plain).initial_weights()
    assert equal(trainer_of(Plain).train(start, job).weights, trainer_of(Torchs).train(start, job).weights)


def test_training_does_not_pay_for_torch_dynamo() -> None:
    code = (
        "import sys; from fedgrpc.worker.trainer import TrainJob, load_trainer;"
        "trainer = load_trainer('fedgrpc.tasks.digits');"
        "trainer.evaluate(trainer.train(trainer.initial_weights(), TrainJob(max_steps=2)).weights);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_embedding_with_sparse_gradients_trains() -> None:
    class Sparse(Plain):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Flatten(), nn.Linear(8, 2))

        def prepare(self, inputs: Tensor, training: bool) -> Tensor:
            return inputs.sign().long() + 1

    trainer = trainer_of(Sparse)
    start = trainer.initial_weights()
    assert not equal(start, trainer.train(start, TrainJob(momentum=0.0)).weights)


def test_max_steps_caps_and_parts_of_epochs_count() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()
    assert trainer.train(start, TrainJob(epochs=3, max_steps=4)).steps == 4
    assert trainer.train(start, TrainJob(epochs=0.5)).steps == 4
    assert trainer.train(start, TrainJob(epochs=1.5)).steps == 11


def test_stopping_raises_between_batches_and_the_trainer_goes_on_to_work() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()
    steps: list[int] = []
    job = TrainJob(epochs=50, stop=lambda: len(steps) >= 3, report=lambda done, total: steps.append(done))
    with pytest.raises(Cancelled):
        trainer.train(start, job)
    assert steps == [1, 2, 3]
    assert equal(trainer.train(start, TrainJob()).weights, trainer_of(Plain).train(start, TrainJob()).weights)


def test_training_ends_in_time_with_what_it_has() -> None:
    trainer = trainer_of(Plain)
    left = iter([3.0, 2.0, 1.0, 0.0])
    start = trainer.initial_weights()
    result = trainer.train(start, TrainJob(epochs=50, time_left_s=lambda: next(left)))
    assert result.steps == 4
    assert not equal(start, result.weights)


def test_a_last_batch_of_one_example_does_not_break_batch_norm() -> None:
    trainer = trainer_of(Normalized)
    result = trainer.train(trainer.initial_weights(), TrainJob())
    assert result.steps == 8
    assert result.weights["1.num_batches_tracked"].dtype == np.int64
    assert result.weights["1.num_batches_tracked"] == 7


def test_frozen_parameters_stay_and_cross() -> None:
    class Frozen(Plain):
        def model(self) -> nn.Module:
            model = super().model()
            model[0].requires_grad_(False)  # type: ignore[index]
            return model

    trainer = trainer_of(Frozen)
    start = trainer.initial_weights()
    trained = trainer.train(start, TrainJob()).weights
    assert np.array_equal(trained["0.weight"], start["0.weight"])
    assert not np.array_equal(trained["3.weight"], start["3.weight"])


def test_training_that_diverges_is_a_task_error_that_says_so() -> None:
    class Exploding(Linear):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.square().sum()

    trainer = trainer_of(Exploding)
    with pytest.raises(TaskError, match="diverged"):
        trainer.train(trainer.initial_weights(), TrainJob(epochs=30, learning_rate=1e3))


def test_weights_of_another_model_are_refused() -> None:
    trainer = trainer_of(Plain)
    with pytest.raises(LayoutError, match="not the run's"):
        trainer.train({"w": np.zeros(3)}, TrainJob())


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
        ({"options": {"threads": "0"}}, "threads must be"),
        ({"options": {"widht": "3"}}, "takes no option 'widht'"),
        ({"partition": "iid", "part": "1/71"}, "cannot be shared out"),
        ({"partition": "x", "part": "1/2"}, "partition 'x'"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(setup: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer_of(Plain, **setup)


def test_threads_are_set_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    trainer_of(Plain, options={"threads": "2"})
    assert asked == [2]


def test_no_data_at_all_is_a_usage_error() -> None:
    class Empty(Plain):
        def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
            return TensorDataset(X[:0], Y[:0]), None

    with pytest.raises(UsageError, match="has no examples"):
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_as_the_cpu_does() -> None:
    start, job = trainer_of(Linear).initial_weights(), TrainJob(epochs=2)
    on_cpu, on_cuda = (trainer_of(Linear, device=name).train(start, job) for name in ("cpu", "cuda"))
    for name in start:
        np.testing.assert_allclose(on_cuda.weights[name], on_cpu.weights[name], atol=1e-4)

"""A TorchTask as a trainer: it is plain local training, repeatable, and can be stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedgrpc.algorithms.algorithm import Term
from fedgrpc.errors import LayoutError, TaskError, TaskUnfit
from fedgrpc.submodels.plan import LocalModelPlan, Pruning
from fedgrpc.torch.task import TorchTask
from fedgrpc.trainer import Cancelled, TaskSetup, TrainJob
from tests.torch.plain import ByItem, Linear, Normalized, Plain, X, Y, equal, trainer_of


def test_one_epoch_is_what_a_plain_torch_loop_gives() -> None:
    """The reference is written out: the same order of batches, SGD with momentum, cross-entropy."""
    trainer, job = trainer_of(Plain), TrainJob(epochs=1, seed=5, round=2, learning_rate=0.05, momentum=0.5)
    start = trainer.initial_weights()
    trainer._builder.module[2].p = 0.0  # type: ignore[index]
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
    monkeypatch.setattr("fedgrpc.torch.training._EVALUATION_BATCH", 7)
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
    proximal = trainer.train(
        w0, TrainJob(batch_size=70, learning_rate=0.3, epochs=2, term=lambda: Term(0.5))
    ).weights
    for name in w0:
        np.testing.assert_allclose(proximal[name], w2[name] - 0.3 * 0.5 * (w1[name] - w0[name]), atol=1e-6)


def test_a_term_shifts_every_gradient_and_leaves_what_it_does_not_train() -> None:
    """One step of the whole batch without momentum: w - lr (g + offset), and nothing of other tensors."""
    trainer = trainer_of(Plain)
    w0 = trainer.initial_weights()
    plan = {"batch_size": 70, "learning_rate": 0.3, "momentum": 0.0, "epochs": 1}
    plain = trainer.train(w0, TrainJob(**plan)).weights
    first, *others = w0
    term = Term(offset={first: np.full_like(w0[first], 2.0)}, trains=(first,))
    shifted = trainer.train(w0, TrainJob(**plan, term=lambda: term)).weights
    np.testing.assert_allclose(shifted[first], plain[first] - 0.3 * 2.0, atol=1e-6)
    assert all(np.array_equal(shifted[name], w0[name]) for name in others)


def test_a_strong_proximal_term_stays_near_the_start() -> None:
    trainer = trainer_of(Plain)
    start = trainer.initial_weights()

    def moved(mu: float) -> float:
        trained = trainer.train(start, TrainJob(epochs=5, learning_rate=0.02, term=lambda: Term(mu))).weights
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
        "import sys; from fedgrpc.trainer import TrainJob; from fedgrpc.worker.task_loader import load_trainer;"
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


def test_inputs_that_are_not_numbers_are_told_apart_from_a_rate_that_is_too_high() -> None:
    class Broken(Plain):
        def prepare(self, inputs: Tensor, training: bool) -> Tensor:
            return inputs * float("nan") if training else inputs

    trainer = trainer_of(Broken)
    start = trainer.initial_weights()
    for plan in (None, LocalModelPlan(pruning=Pruning(0.5))):
        with pytest.raises(TaskError, match="very first batch is NaN: look at the inputs"):
            trainer.train(start, TrainJob(local_model=plan))


def test_weights_of_another_model_are_refused() -> None:
    trainer = trainer_of(Plain)
    with pytest.raises(LayoutError, match="not the run's"):
        trainer.train({"w": np.zeros(3)}, TrainJob())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_as_the_cpu_does() -> None:
    start, job = trainer_of(Linear).initial_weights(), TrainJob(epochs=2)
    on_cpu, on_cuda = (trainer_of(Linear, device=name).train(start, job) for name in ("cpu", "cuda"))
    for name in start:
        np.testing.assert_allclose(on_cuda.weights[name], on_cpu.weights[name], atol=1e-4)


def test_a_buffer_that_is_there_only_once_the_model_ran_is_told_by_name() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.register_buffer("seen", None)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.seen = inputs.detach().mean(0)
            outputs: torch.Tensor = self.head(inputs)
            return outputs

    class Task(TorchTask):
        def model(self) -> nn.Module:
            return Late()

        def data(self, path: Path | None) -> tuple[Any, Any]:
            return TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), None

    trainer = Task.build_trainer(TaskSetup())
    weights = trainer.initial_weights()
    with pytest.raises(TaskUnfit, match="'seen' at first or once it ran"):
        trainer.train(trainer.train(weights, TrainJob()).weights, TrainJob())

"""What users implement: the `Trainer` protocol, and the values that pass between a worker and a trainer.

The rule: nothing here needs torch. Weights are numpy arrays by name, in a fixed order. A trainer runs in a
thread, off the event loop; it asks the job between batches whether to go on, and never talks to the network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.training_plan import TrainingPlan

Weights = Mapping[str, np.ndarray]
# Names of tensors, and what they have in common.
TensorsByReason = list[tuple[list[str], str]]

_MOST_THREADS: Final = 1024


class Cancelled(Exception):
    """Training was stopped between two batches; nothing of it is kept."""


def _never() -> bool:
    return False


def _no_report(done_steps: int, total_steps: int) -> None:
    return None


def _no_pause(batch_seconds: float) -> None:
    return None


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed must be from 0 to {(1 << 32) - 1}, not {seed}")


@dataclass(frozen=True)
class TrainJob(TrainingPlan):
    """One worker's share of one round: a training plan, whose work it is, and when to stop.

    `seed` has 32 bits, as the generators of NumPy and scikit-learn want, else `UsageError`. It differs between
    workers and rounds. `local_model` says what to make of the given weights before they are trained; None trains
    them as they are. `stop` is asked before every batch: True cancels. `time_left_s` bounds the training in time,
    the plan's `upload_reserve_s` taken off: once it is not positive, what has been trained so far is the result.
    `report` hears of every finished step. `pause` is given each batch's duration and may sleep, which slows the
    training down honestly.
    """

    epochs: float = 1.0
    seed: int = 0
    round: int = 0
    local_model: LocalModelPlan | None = None
    stop: Callable[[], bool] = _never
    time_left_s: Callable[[], float] | None = None
    report: Callable[[int, int], None] = _no_report
    pause: Callable[[float], None] = _no_pause

    def __post_init__(self) -> None:
        # A plan was checked when it was made. A job made by hand may go further, as with a learning rate of 0.
        _check_seed(self.seed)

    def total_steps(self, example_count: int, default_batch_size: int = 32) -> int:
        """Steps that `epochs` passes over `example_count` examples take; `max_steps` caps them."""
        batch_size = self.batch_size or default_batch_size
        steps = max(1, math.ceil(self.epochs * math.ceil(example_count / batch_size) - 1e-9))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def batches(self, example_count: int, default_batch_size: int = 32) -> Iterator[np.ndarray]:
        """Index batches (int64) of a training run, freshly shuffled each epoch from `seed` and `round`.

        Between batches it does all a federation asks: raises `Cancelled` when told to stop, ends early when
        the time is up, reports progress and pauses. At least one batch is always yielded.

        Raises:
            UsageError: there is nothing to train on.
        """
        if example_count < 1:
            raise UsageError("there are no training examples")
        batch_size = self.batch_size or default_batch_size
        total = self.total_steps(example_count, batch_size)
        shuffled = _shuffled_batches(np.random.default_rng((self.seed, self.round)), example_count, batch_size)
        for done in range(total):
            if self.stop():
                raise Cancelled
            if done and self.time_left_s is not None and self.time_left_s() <= 0:
                return
            started_s = time.perf_counter()
            yield next(shuffled)
            self.pause(time.perf_counter() - started_s)
            self.report(done + 1, total)


def _shuffled_batches(rng: np.random.Generator, example_count: int, batch_size: int) -> Iterator[np.ndarray]:
    while True:
        order = rng.permutation(example_count)
        for start in range(0, example_count, batch_size):
            yield order[start : start + batch_size]


@dataclass(frozen=True)
class TrainResult:
    """Weights after training, and the number of local examples that stand behind them.

    Of a compressed local model, `start` has the weights that training began with (None: the given ones), `masks`
    where a tensor was trained at all (bool of its shape), and `clustered` the tensors of few different values.
    `tensor_bytes` is what weights, gradients, optimizer state and the backward pass took; 0: not known.
    """

    weights: Weights
    example_count: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: Weights | None = None
    masks: Weights = field(default_factory=dict)
    clustered: Collection[str] = ()
    tensor_bytes: int = 0


@dataclass(frozen=True)
class EvalResult:
    """Metrics (`loss`, `accuracy`, ...) of one set of weights on `example_count` held-out examples.

    `not_finite`: names of those that are NaN or infinite, and left out of the metrics. A trainer need not tell.
    """

    example_count: int
    metrics: Mapping[str, float]
    not_finite: tuple[str, ...] = ()


@runtime_checkable
class Trainer(Protocol):
    """Trains and scores one model on this device's data. Implement it directly for NumPy or scikit-learn.

    A class is constructed with those of `data`, `model`, `device`, `partition`, `part`, `seed`, `threads`, `setup`
    and its own options that its constructor names. Arrays handed in are the trainer's own: it may train in them
    and return them, as `torch.from_numpy` and scikit-learn do.

    It may have a method `roles() -> Mapping[str, str]`: by name, what is no "parameter" but a "statistic" that
    training measures, a "counter", or a "constant" (`TensorRole`). Without, names tell PyTorch's batch statistics.
    """

    def initial_weights(self) -> Weights:
        """The untrained model; its names, shapes and dtypes are the model's layout."""
        ...

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Train from `weights`; raises `Cancelled` when `job.stop()` says so."""
        ...

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Score `weights` on local held-out data; None where there is none."""
        ...


@runtime_checkable
class SliceableTrainer(Trainer, Protocol):
    """A trainer that takes weights of any sub-model of its model's channels, and heeds `TrainJob.local_model`."""

    def channels(self) -> ChannelMap:
        """The channel groups of its model."""
        ...


@dataclass(frozen=True)
class TaskSetup:
    """What the person who starts a worker says about its task."""

    model: str | None = None
    data: Path | None = None
    device: str = "auto"
    partition: str | None = None
    part: str | None = None
    seed: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for half of what goes together, a seed of more than 32 bits, or less than a thread."""
        _check_seed(self.seed)
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise UsageError(f"threads must be from 1 to {_MOST_THREADS}, not {self.threads}")
        if (self.partition is None) != (self.part is None):
            raise UsageError("--partition and --part go together, as in --partition dirichlet:0.5 --part 3/10")


def roles(trainer: Trainer) -> Mapping[str, str]:
    """The roles of tensors as the trainer tells them, by name; where it tells none, their names do."""
    tell = getattr(trainer, "roles", None)
    return {} if tell is None else tell()


def tied_names(trainer: Trainer) -> Mapping[str, tuple[str, ...]]:
    """Further names of tensors, by the name under which they are among the weights; of many trainers, none."""
    tell = getattr(trainer, "tied_names", None)
    return {} if tell is None else tell()


def full_width_tensors(trainer: Trainer) -> TensorsByReason:
    """The tensors that no width makes narrower, together by reason; of a trainer that does not tell, none."""
    tell = getattr(trainer, "full_width_tensors", None)
    return [] if tell is None else tell()

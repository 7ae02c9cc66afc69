"""Interface that users implement: the `Trainer` protocol, and the values between a worker and a trainer.

The rule: nothing here needs torch. Weights are numpy arrays by name, in a fixed order. A trainer runs in a
thread, off the event loop. It checks between batches whether the job is cancelled, and never uses the network.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np

from fedgrpc.algorithms.algorithm import NO_TERM, Term
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.training_plan import TrainingPlan

Weights = Mapping[str, np.ndarray]
# Names of tensors, and the reason that they have in common.
TensorsByReason = list[tuple[list[str], str]]

_MOST_THREADS: Final = 1024


class Cancelled(Exception):
    """Training was cancelled between two batches. Its result is discarded."""


def _never() -> bool:
    return False


def _no_report(done_steps: int, total_steps: int) -> None:
    return None


def _no_pause(batch_seconds: float) -> None:
    return None


@dataclass(frozen=True)
class Epoch:
    """One pass over the local examples: its number, of how many, its batches, and its seconds with all pauses."""

    number: int
    of: int
    batches: int
    seconds: float


def _no_epoch(epoch: Epoch) -> None:
    return None


def _no_term() -> Term:
    return NO_TERM


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed must be from 0 to {(1 << 32) - 1}, not {seed}")


@dataclass(frozen=True)
class TrainJob(TrainingPlan):
    """One worker's training in one round: the training plan, the worker's seed, and callbacks to the worker.

    `seed` has 32 bits, the most that generators of NumPy and scikit-learn take, else `UsageError`. It differs
    between workers and rounds. `local_model` is the plan of the local model to train; None trains the given
    weights as they are. `stop` is called before every batch, and True cancels. `time_left_s` returns the time
    that is left to train, without the plan's `upload_reserve_s`. Once it is not positive, training ends with the
    result so far. `report` is called after every step, `report_epoch` after the last batch of every epoch.
    `pause` gets each batch's duration and may sleep, to emulate a slower device. `term` returns what the run's
    algorithm adds to every gradient (`Term.gradient`): a trainer that never asks for it can take part in no run
    that has one.
    """

    epochs: float = 1.0
    seed: int = 0
    round: int = 0
    local_model: LocalModelPlan | None = None
    stop: Callable[[], bool] = _never
    time_left_s: Callable[[], float] | None = None
    report: Callable[[int, int], None] = _no_report
    report_epoch: Callable[[Epoch], None] = _no_epoch
    pause: Callable[[float], None] = _no_pause
    term: Callable[[], Term] = _no_term

    def __post_init__(self) -> None:
        # A plan was checked when it was made. A job made by hand may go further, as with a learning rate of 0.
        _check_seed(self.seed)

    def total_steps(self, example_count: int, default_batch_size: int = 32) -> int:
        """Count the steps of `epochs` passes over `example_count` examples, at most `max_steps`."""
        batch_size = self.batch_size or default_batch_size
        steps = max(1, math.ceil(self.epochs * math.ceil(example_count / batch_size) - 1e-9))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def batches(self, example_count: int, default_batch_size: int = 32) -> Iterator[np.ndarray]:
        """Yield index batches (int64) of a training run, shuffled each epoch from `seed` and `round`.

        Between batches the iterator reports progress, pauses, and ends early when the time is up. At least one
        batch is always yielded.

        Raises:
            Cancelled: `stop` returned True.
            UsageError: there are no examples.
        """
        if example_count < 1:
            raise UsageError("there are no training examples")
        batch_size = self.batch_size or default_batch_size
        total = self.total_steps(example_count, batch_size)
        shuffled = _shuffled_batches(np.random.default_rng((self.seed, self.round)), example_count, batch_size)
        in_epoch = math.ceil(example_count / batch_size)
        for epoch, first in enumerate(range(0, total, in_epoch), 1):
            started_s, last, done = time.perf_counter(), min(first + in_epoch, total), first
            for indices in self._watched(itertools.islice(shuffled, last - first), first, total):
                yield indices
                done += 1
            if done > first:
                of = math.ceil(total / in_epoch)
                self.report_epoch(Epoch(epoch, of, done - first, time.perf_counter() - started_s))
            if done < last:
                return

    def _watched(self, batches: Iterator[np.ndarray], first: int, total: int) -> Iterator[np.ndarray]:
        """Yield the batches of an epoch, `first` steps being done, until the time is up. Raises Cancelled."""
        for done, indices in enumerate(batches, first):
            if self.stop():
                raise Cancelled
            if done and self.time_left_s is not None and self.time_left_s() <= 0:
                return
            started_s = time.perf_counter()
            yield indices
            self.pause(time.perf_counter() - started_s)
            self.report(done + 1, total)


def _shuffled_batches(rng: np.random.Generator, example_count: int, batch_size: int) -> Iterator[np.ndarray]:
    while True:
        order = rng.permutation(example_count)
        for start in range(0, example_count, batch_size):
            yield order[start : start + batch_size]


@dataclass(frozen=True)
class TrainResult:
    """Weights after training, and the number of local examples that they were trained on.

    For a local model, `start` has the weights at the start of training (None: the given ones). `masks` says which
    elements of a tensor were trained (bool of its shape), and `clustered` which tensors have few different values.
    `tensor_bytes` are those of weights, gradients, optimizer state and the backward pass; 0 is unknown.

    `noise_ratio` is what a number format did to the update d: ||d - d32||^2 / ||d32||^2, where d32 is that of the
    same steps in float32. The update then weighs 1 / (1 + noise_ratio) of what it would; 0: none, or not measured.
    """

    weights: Weights
    example_count: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: Weights | None = None
    masks: Weights = field(default_factory=dict)
    clustered: Collection[str] = ()
    tensor_bytes: int = 0
    noise_ratio: float = 0.0


@dataclass(frozen=True)
class EvalResult:
    """Metrics (`loss`, `accuracy`, ...) of one set of weights on `example_count` held-out examples.

    `not_finite`: names of those that are NaN or infinite, and left out of the metrics. A trainer need not tell.
    """

    example_count: int
    metrics: Mapping[str, float]
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalExamples:
    """Number of examples on a device, and a value that stays equal while they are the same.

    `held_out`: how many there are to score with; 0: none, or not told.
    """

    count: int
    version: object
    held_out: int = 0

    def new_since(self, trained: LocalExamples | None) -> int:
        """Count those that are new since `trained` (None: nothing was). Other data that is no more is all new."""
        if trained is None:
            return self.count
        if self.version == trained.version:
            return 0
        return self.count - trained.count if self.count > trained.count else self.count


@runtime_checkable
class Trainer(Protocol):
    """Trains and scores one model on this device's data. Implement it directly for NumPy or scikit-learn.

    A class is constructed with those of `data`, `model`, `device`, `partition`, `part`, `seed`, `threads`, `setup`
    and its own options that its constructor names. Arrays handed in are the trainer's own: it may train in them
    and return them, as `torch.from_numpy` and scikit-learn do.

    It may have a method `roles() -> Mapping[str, str]`: by name, what is no "parameter" but a "statistic" that
    training measures, a "counter", or a "constant" (`TensorRole`). Without, names tell PyTorch's batch statistics.
    And a method `local_examples() -> LocalExamples`, by which a continuous run waits for new data on devices.
    """

    def initial_weights(self) -> Weights:
        """Return the untrained model, whose names, shapes and dtypes are the model's layout."""
        ...

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Train from `weights`. Raises `Cancelled` once `job.stop()` returns True."""
        ...

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Score `weights` on local held-out data. Returns None without any."""
        ...


@runtime_checkable
class SliceableTrainer(Trainer, Protocol):
    """Trainer that can train sub-models of its model's channels, and the local model of `TrainJob.local_model`.

    Its weights are read on access, each time anew, so that a device holds one tensor of them at a time. They are
    not its own to change.

    It may have a method `layout() -> Layout`, which tells names and shapes of its whole model without building it,
    and `activation_bytes() -> int`, the bytes that its backward pass keeps beside weights.
    """

    def channels(self) -> ChannelMap:
        """Return the channel groups of its model."""
        ...


@dataclass(frozen=True)
class TaskSetup:
    """Settings of a learning task from the command line of its worker."""

    model: str | None = None
    data: Path | None = None
    device: str = "auto"
    partition: str | None = None
    part: str | None = None
    seed: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a wrong seed or number of threads, or only one of partition and part."""
        _check_seed(self.seed)
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise UsageError(f"threads must be from 1 to {_MOST_THREADS}, not {self.threads}")
        if (self.partition is None) != (self.part is None):
            raise UsageError("--partition and --part go together, as in --partition dirichlet:0.5 --part 3/10")


def model_layout(trainer: Trainer) -> Layout:
    """Return the layout of the trainer's whole model without its values; empty without such a method."""
    tell = getattr(trainer, "layout", None)
    return () if tell is None else tell()


def activation_bytes(trainer: Trainer) -> int:
    """Return the bytes that the whole model's backward pass keeps beside weights; 0 without such a method."""
    tell = getattr(trainer, "activation_bytes", None)
    return 0 if tell is None else int(tell())


def weight_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights by name, without reading those that are read on access."""
    layout: Layout | None = getattr(weights, "layout", None)
    if layout is not None:
        return {spec.name: spec.shape for spec in layout}
    return {name: tuple(array.shape) for name, array in weights.items()}


def local_examples(trainer: Trainer) -> LocalExamples | None:
    """Return the examples that there are to train on now; None from a trainer that does not tell."""
    tell = getattr(trainer, "local_examples", None)
    return None if tell is None else tell()


def for_part(trainer: Trainer, partition: str, part: str) -> Trainer | None:
    """Return a trainer of one part of the trainer's data, as a worker with these settings has it.

    The data is read once for all parts. None from a trainer that cannot share what it has read.
    """
    share = getattr(trainer, "for_part", None)
    return None if share is None else share(partition, part)


def roles(trainer: Trainer) -> Mapping[str, str]:
    """Return the roles of tensors by name, from the trainer's method `roles`; empty without one."""
    tell = getattr(trainer, "roles", None)
    return {} if tell is None else tell()


def tied_names(trainer: Trainer) -> Mapping[str, tuple[str, ...]]:
    """Return further names of tied tensors, by their name among the weights; empty without such a method."""
    tell = getattr(trainer, "tied_names", None)
    return {} if tell is None else tell()


def small_device_remarks(trainer: Trainer) -> Sequence[str]:
    """Return what of the trainer's settings would go wrong on a small device; empty without such a method."""
    tell = getattr(trainer, "small_device_remarks", None)
    return () if tell is None else list(tell())


def full_width_tensors(trainer: Trainer) -> TensorsByReason:
    """Return the tensors that no width makes narrower, by reason; empty without such a method."""
    tell = getattr(trainer, "full_width_tensors", None)
    return [] if tell is None else tell()

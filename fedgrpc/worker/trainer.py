"""What a worker asks of the code that trains: the `Trainer` protocol and how one is found by name.

The rule: nothing here needs torch. Weights are numpy arrays by name, in a fixed order. A trainer runs in a
thread, off the event loop; it asks the job between batches whether to go on, and never talks to the network.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import structlog

from fedgrpc.errors import FedgrpcError, TaskError, UsageError
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import CompressionPlan
from fedgrpc.worker.threads import rest_while_waiting

Weights = Mapping[str, np.ndarray]

_MOST_THREADS: Final = 1024

log = structlog.get_logger()


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
class TrainJob:
    """One worker's share of one round: how much to train, how, and when to stop.

    `None` for `batch_size`, `learning_rate`, `momentum` or `weight_decay` leaves the choice to the task.
    `proximal_mu` is the mu of FedProx (arXiv 1812.06127); 0 is FedAvg. `label_adjustment` is the tau of logit
    adjustment by its own labels (arXiv 2007.07314); 0 is the loss as it is. `seed` has 32 bits, as the generators
    of NumPy and scikit-learn want; it differs between workers and rounds. `stop` is asked before every batch: True
    cancels.
    `compression` says what to make of the given weights before they are trained; None trains them as they are.
    `time_left_s` bounds the training in time: once it is not positive, what has been trained so far is the
    result. `report` hears of every finished step; `pause` is told each batch's duration and may sleep, which
    slows the training down honestly.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    proximal_mu: float = 0.0
    label_adjustment: float = 0.0
    seed: int = 0
    round: int = 0
    compression: CompressionPlan | None = None
    stop: Callable[[], bool] = _never
    time_left_s: Callable[[], float] | None = None
    report: Callable[[int, int], None] = _no_report
    pause: Callable[[float], None] = _no_pause

    def __post_init__(self) -> None:
        """Raises UsageError for a seed of more than 32 bits."""
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
    """A trainer that takes weights of any sub-model of its model's channels, and heeds `TrainJob.compression`."""

    def channels(self) -> ChannelMap:
        """The channel groups of its model."""
        ...


# Names of tensors, and what they have in common.
Reasons = list[tuple[list[str], str]]


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


def load_trainer(
    reference: str,
    *,
    model: str | None = None,
    data: Path | None = None,
    device: str = "auto",
    partition: str | None = None,
    part: str | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    threads: int | None = None,
    here: bool = True,
) -> Trainer:
    """Find and construct the task `package.module:Class`, or `package.module` with one task class in it.

    `partition` (`iid`, `dirichlet:0.5`, `shards:2`, `labels:2`, `quantity:0.5`) with `part` (`3/10`) makes the
    task take its share of a common data set. `here`: modules in the working folder are found, too. The trainer
    that comes back raises only `Cancelled`, `UsageError`, other errors of `fedgrpc.errors`, and `TaskError` for
    whatever the user's code raises.

    Raises:
        UsageError: no such module or class, it is no task, or it does not take a setting that was given.
        TaskError: importing or constructing it raised.
    """
    setup = TaskSetup(model, data, device, partition, part, seed, dict(options or {}), threads)
    task = find_task(reference, here)
    with _blaming(reference):
        trainer = _construct(task, setup, reference)
    if isinstance(trainer, SliceableTrainer):
        return _GuardedSliceableTrainer(trainer, reference)
    return _GuardedTrainer(trainer, reference)


def find_task(reference: str, here: bool = True) -> type:
    """The class that `load_trainer` constructs; `here`: also in the working folder. Raises as it does."""
    rest_while_waiting()
    module_name, _, class_name = reference.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(f"task {reference!r} must look like package.module or package.module:Class")
    if module_name.endswith(".py"):
        raise UsageError(f"task {reference!r} must be the name of a module, without .py: {module_name[:-3]}")
    if here and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script, unlike `python -m`, does not look beside the user
    with _blaming(reference):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(_missing_module(reference, module_name, error)) from error
    class_name = class_name or getattr(module, "TASK", "")
    found = getattr(module, class_name, None) if class_name else _only_task(module, reference)
    if not isinstance(found, type):
        raise UsageError(f"task {reference}: module {module_name} has no class {class_name!r}")
    if not _is_task(found):
        raise UsageError(f"task {reference}: {class_name} lacks initial_weights, train or evaluate")
    return found


def _missing_module(reference: str, module_name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or "?"
    if missing == module_name or module_name.startswith(missing + "."):
        return f"task {reference}: there is no module {missing!r}; is its folder on PYTHONPATH?"
    extra = " (pip install 'fedgrpc[torch]')" if missing == "torch" else ""
    return f"task {reference}: it needs the module {missing!r}, which is not installed{extra}"


def _only_task(module: Any, reference: str) -> type:
    own = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    tasks = [item for item in own if _is_task(item)]
    if len(tasks) != 1:
        names = ", ".join(item.__name__ for item in tasks) or "none"
        raise UsageError(f"task {reference}: name its class as module:Class; task classes found: {names}")
    return tasks[0]


def _is_task(item: type) -> bool:
    methods = ("initial_weights", "train", "evaluate")
    return hasattr(item, "build_trainer") or all(callable(getattr(item, name, None)) for name in methods)


def _construct(task: Any, setup: TaskSetup, reference: str) -> Trainer:
    """A class with `build_trainer(setup)`, as a `TorchTask`, is asked; any other gets what it names."""
    if hasattr(task, "build_trainer"):
        trainer: Trainer = task.build_trainer(setup)
    else:
        trainer = task(**constructor_arguments(task, setup, reference))
    return trainer


def constructor_arguments(
    task: type, setup: TaskSetup, reference: str, taken: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that `task`'s constructor names, with options turned into the type of their default.

    `taken` are settings and options that something else sees to; naming them here is optional.

    Raises:
        UsageError: a setting was given that nobody takes, or an option does not parse.
    """
    parameters = _parameters(task)
    given: dict[str, Any] = {"data": setup.data, "model": setup.model, "device": setup.device}
    given |= {"partition": setup.partition, "part": setup.part, "seed": setup.seed, "setup": setup}
    given["threads"] = setup.threads
    arguments = {name: value for name, value in given.items() if name in parameters and value is not None}
    for name in ("data", "model", "partition"):
        if given[name] is not None and not {name, "setup"} & {*parameters, *taken}:
            raise UsageError(f"task {reference} takes no --{name}")
    own = {name: each for name, each in parameters.items() if name not in given}
    for name, text in setup.options.items():
        if name in own:
            arguments[name] = _parse_option(name, text, own[name].default)
        elif name not in taken:
            raise UsageError(f"task {reference} takes no option {name!r}; it takes: {', '.join(own) or 'none'}")
    return arguments


def takes(task: type, setting: str) -> bool:
    """Whether a task that `find_task` has found makes use of a setting, such as `partition`."""
    return hasattr(task, "build_trainer") or bool({setting, "setup"} & {*_parameters(task)})


def _parameters(task: type) -> Mapping[str, inspect.Parameter]:
    if task.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(task).parameters
    return {name: each for name, each in parameters.items() if each.kind in named}


def _parse_option(name: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"option {name} must be true or false, not {text!r}")
        return text.lower() == "true"
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            raise UsageError(f"option {name} must be a number like {default}, not {text!r}") from None
    return text


@contextmanager
def _blaming(reference: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a `TaskError` of one line that names it."""
    try:
        yield
    except (Cancelled, FedgrpcError):
        raise
    except (Exception, SystemExit) as error:
        log.debug("the learning task raised", task=reference, exc_info=True)
        text = " ".join(str(error).split())[:300]
        where = _line_of(error, reference)
        raise TaskError(f"task {reference} raised {type(error).__name__}: {text}{where}") from error


def _line_of(error: BaseException, reference: str) -> str:
    """The innermost line of the task's own package, and notes; the library's where there are neither."""
    if isinstance(error, SyntaxError):
        return ""  # its text says where
    package = reference.partition(":")[0].partition(".")[0]
    lines = list(traceback.walk_tb(error.__traceback__))
    own = [line for line in lines if line[0].f_globals.get("__name__", "").partition(".")[0] == package]
    parts = [str(note) for note in getattr(error, "__notes__", [])]
    if own or (lines and not parts):
        frame, number = (own or lines)[-1]
        parts.append(f"{Path(frame.f_code.co_filename).name}:{number}")
    return f" ({'; '.join(parts)})" if parts else ""


class _GuardedTrainer:
    """The user's trainer, with its exceptions turned into `TaskError`."""

    def __init__(self, inner: Trainer, reference: str) -> None:
        self._inner = inner
        self._reference = reference

    def initial_weights(self) -> Weights:
        with _blaming(self._reference):
            return self._inner.initial_weights()

    def roles(self) -> Mapping[str, str]:
        """As `roles`."""
        with _blaming(self._reference):
            return roles(self._inner)

    def tied_names(self) -> Mapping[str, tuple[str, ...]]:
        """As `tied_names`."""
        with _blaming(self._reference):
            return tied_names(self._inner)

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        with _blaming(self._reference):
            return self._inner.train(weights, job)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        with _blaming(self._reference):
            return self._inner.evaluate(weights)


class _GuardedSliceableTrainer(_GuardedTrainer):
    """The same of one whose model can be made narrower."""

    def __init__(self, inner: SliceableTrainer, reference: str) -> None:
        super().__init__(inner, reference)
        self._sliceable = inner

    def channels(self) -> ChannelMap:
        with _blaming(self._reference):
            return self._sliceable.channels()

    def kept_whole(self) -> Reasons:
        """As `kept_whole`."""
        with _blaming(self._reference):
            return kept_whole(self._sliceable)


def roles(trainer: Trainer) -> Mapping[str, str]:
    """The roles of tensors as the trainer tells them, by name; where it tells none, their names do."""
    tell = getattr(trainer, "roles", None)
    return {} if tell is None else tell()


def tied_names(trainer: Trainer) -> Mapping[str, tuple[str, ...]]:
    """Further names of tensors, by the name under which they are among the weights; of many trainers, none."""
    tell = getattr(trainer, "tied_names", None)
    return {} if tell is None else tell()


def kept_whole(trainer: Trainer) -> Reasons:
    """The tensors that no width makes narrower, together by reason; of a trainer that does not tell, none."""
    tell = getattr(trainer, "kept_whole", None)
    return [] if tell is None else tell()

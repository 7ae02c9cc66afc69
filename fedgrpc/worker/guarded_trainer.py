"""A trainer whose calls cost their task and never the worker, whatever users' code raises or returns.

The rule: a guarded trainer raises nothing but `Cancelled` and errors of `fedgrpc.errors`. Whatever else users'
code raises, and a result of another type than is due, is a `TaskError` of one line. The traceback is logged once
for each place that raises, however many rounds it spoils.
"""

from __future__ import annotations

import math
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
import structlog

from fedgrpc.claims import NOISE_RATIO
from fedgrpc.codec.layout import Layout, TensorRole, layout_of
from fedgrpc.errors import EncodeError, FedgrpcError, TaskError, TaskUnfit
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.trainer import (
    Cancelled,
    EvalResult,
    LocalExamples,
    SliceableTrainer,
    TensorsByReason,
    Trainer,
    TrainJob,
    TrainResult,
    Weights,
    activation_bytes,
    for_part,
    full_width_tensors,
    local_examples,
    model_layout,
    roles,
    small_device_remarks,
    tied_names,
)

_MOST: Final = 1 << 63
_MOST_CHARS: Final = 300
_PACKAGE: Final = str(Path(__file__).resolve().parents[1])
_LIBRARIES: Final = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_MOST_PLACES: Final = 100
_LOGGED: set[tuple[str, int | None, type]] = set()
RAISED: Final = "the learning task raised"

log = structlog.get_logger()


@contextmanager
def users_code(reference: str = "") -> Iterator[None]:
    """Turn any exception of the user's code into a `TaskError` that names the task of that reference."""
    try:
        yield
    except (Cancelled, FedgrpcError):
        raise
    except (Exception, SystemExit) as error:
        # A `sys.exit()` in users' code costs its task, and does not end the worker.
        _log_once(error, reference)
        text = " ".join(str(error).split())[:_MOST_CHARS]
        task = f"task {reference}" if reference else "the learning task"
        raise TaskError(f"{task} raised {type(error).__name__}: {text}{_line_of(error, reference)}") from error


def _log_once(error: BaseException, reference: str) -> None:
    """Log the traceback of a place in the user's code that has not raised before in this process."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    place = (frame.filename, frame.lineno, type(error))
    if place in _LOGGED:
        return
    if len(_LOGGED) < _MOST_PLACES:
        _LOGGED.add(place)
        log.error(RAISED, task=reference, exception=users_traceback(error).rstrip())


def users_traceback(error: BaseException) -> str:
    """Return the traceback of what the user's code raised, from its first line on, without fedgrpc's lines."""
    if isinstance(error, FedgrpcError):
        return ""
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)] or frames
    # Of libraries that fedgrpc calls, only what the user's code has called is of interest.
    first = next((place for place, frame in enumerate(own) if not frame.filename.startswith(_LIBRARIES)), 0)
    shown = traceback.format_list(own[first:])
    return "".join(["Traceback (most recent call last):\n", *shown, *traceback.format_exception_only(error)])


def _line_of(error: BaseException, reference: str) -> str:
    """Return the innermost line of the task's own package and notes, else the library's line."""
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


def guarded(trainer: Trainer, reference: str = "") -> Trainer:
    """Return the trainer with its calls guarded; `reference` names it in errors."""
    if isinstance(trainer, _GuardedTrainer):
        return trainer
    guard = _GuardedSliceableTrainer if isinstance(trainer, SliceableTrainer) else _GuardedTrainer
    return guard(trainer, reference)


def first_weights(trainer: Trainer) -> tuple[Weights, Layout]:
    """Return the untrained weights and their layout. Raises TaskError; TaskUnfit if no run can use them."""
    trainer = guarded(trainer)
    with users_code():
        weights = trainer.initial_weights()
        return weights, _layout_of(roles(trainer), tied_names(trainer), weights)


class _GuardedTrainer:
    """Guard of a trainer with its optional methods."""

    def __init__(self, inner: Any, reference: str) -> None:
        self._inner = inner
        self._reference = reference

    def initial_weights(self) -> Weights:
        with users_code(self._reference):
            return _arrays("initial_weights", self._inner.initial_weights())

    def roles(self) -> Mapping[str, str]:
        """Return `roles` of the trainer."""
        with users_code(self._reference):
            return roles(self._inner)

    def tied_names(self) -> Mapping[str, tuple[str, ...]]:
        """Return `tied_names` of the trainer."""
        with users_code(self._reference):
            return tied_names(self._inner)

    def layout(self) -> Layout:
        """Return `model_layout` of the trainer."""
        with users_code(self._reference):
            return model_layout(self._inner)

    def activation_bytes(self) -> int:
        """Return `activation_bytes` of the trainer."""
        with users_code(self._reference):
            return activation_bytes(self._inner)

    def local_examples(self) -> LocalExamples | None:
        """Return `local_examples` of the trainer."""
        with users_code(self._reference):
            return local_examples(self._inner)

    def small_device_remarks(self) -> Sequence[str]:
        """Return `small_device_remarks` of the trainer."""
        with users_code(self._reference):
            return small_device_remarks(self._inner)

    def for_part(self, partition: str, part: str) -> Trainer | None:
        """Return `for_part` of the trainer, guarded likewise."""
        with users_code(self._reference):
            share = for_part(self._inner, partition, part)
            return None if share is None else guarded(share, self._reference)

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        with users_code(self._reference):
            return _train_result(self._inner.train(weights, job))

    def evaluate(self, weights: Weights) -> EvalResult | None:
        with users_code(self._reference):
            return _eval_result(self._inner.evaluate(weights))


class _GuardedSliceableTrainer(_GuardedTrainer):
    """`_GuardedTrainer` of a trainer that can train sub-models."""

    def channels(self) -> ChannelMap:
        with users_code(self._reference):
            channels: ChannelMap = self._inner.channels()
            return channels

    def full_width_tensors(self) -> TensorsByReason:
        """Return `full_width_tensors` of the trainer."""
        with users_code(self._reference):
            return full_width_tensors(self._inner)


def is_sliceable(trainer: Trainer) -> TypeGuard[SliceableTrainer]:
    """Return whether the trainer can train sub-models."""
    # To look at a guard's type is twenty times as fast as to look for the methods of a protocol.
    kind = _GuardedSliceableTrainer if isinstance(trainer, _GuardedTrainer) else SliceableTrainer
    return isinstance(trainer, kind)


def _layout_of(roles: Any, tied_names: Any, weights: Weights) -> Layout:
    """Return the layout of initial weights, with the roles and tied names that the trainer declares for some.

    Also raises TaskUnfit, for weights that no run could start from.
    """
    if not isinstance(roles, Mapping) or not isinstance(tied_names, Mapping):
        raise TaskError("roles() and tied_names() of the learning task must give roles, and tied names, by name")
    if unknown := (roles.keys() | tied_names.keys()) - weights.keys():
        raise TaskError(
            f"the learning task tells the role or tied names of {min(unknown)!r}, no weights of its own"
        )
    try:
        told = {name: TensorRole(role) for name, role in roles.items()}
    except ValueError as error:
        raise TaskError(f"the learning task tells a role that there is not: {error}") from None
    try:
        known = layout_of({name: np.asarray(array) for name, array in weights.items()})
    except EncodeError as error:
        raise TaskUnfit(f"initial_weights() of the learning task: {error}") from error
    found = tuple(
        replace(spec, role=told.get(spec.name, spec.role), tied_names=tuple(tied_names.get(spec.name, ())))
        for spec in known
    )
    for spec in found:
        if spec.is_trained and not np.isfinite(weights[spec.name]).all():
            raise TaskUnfit(
                f"the initial weights {spec.name!r} are not all finite; if they are a mask or a table, "
                "let the learning task's roles() call them constant"
            )
    return found


def _train_result(returned: Any) -> TrainResult:
    """Validate the result of `Trainer.train`."""
    if not isinstance(returned, TrainResult):
        raise TaskError(f"train() of the learning task returned {_kind(returned)}, not a TrainResult")
    return TrainResult(
        _arrays("train", returned.weights),
        _count("example_count", returned.example_count, least=1),
        _count("steps", returned.steps),
        _finite(returned.metrics),
        returned.start,
        returned.masks,
        returned.clustered,
        _count("tensor_bytes", returned.tensor_bytes),
        _ratio("noise_ratio", returned.noise_ratio),
    )


def _eval_result(returned: Any) -> EvalResult | None:
    """Validate the result of `Trainer.evaluate`."""
    if returned is None:
        return None
    if not isinstance(returned, EvalResult):
        raise TaskError(f"evaluate() of the learning task returned {_kind(returned)}, not an EvalResult or None")
    # Means over no example are NaN, or whatever a library makes of them.
    count = _count("example_count", returned.example_count)
    metrics = _finite(returned.metrics)
    return (
        EvalResult(count, metrics, tuple(sorted(map(str, returned.metrics.keys() - metrics)))) if count else None
    )


def _arrays(method: str, weights: Any) -> Weights:
    if not isinstance(weights, Mapping):
        raise TaskError(f"{method}() of the learning task gave {_kind(weights)} as weights, not arrays by name")
    for name, array in weights.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray | np.generic):
            raise TaskError(
                f"{method}() of the learning task gave {_kind(array)} as weight {name!r}; "
                "weights are NumPy arrays by name"
            )
    return weights


def _ratio(name: str, value: Any) -> float:
    if not isinstance(value, int | float | np.integer | np.floating) or not value >= 0:
        raise TaskError(f"the learning task reports {value} as {name}; it must be a number from 0")
    return min(float(value), NOISE_RATIO.most)


def _count(name: str, value: Any, least: int = 0) -> int:
    number = isinstance(value, int | float | np.integer | np.floating)
    if not number or not least <= value < _MOST or value != int(value):
        raise TaskError(f"the learning task reports {value} as {name}; it must be a whole number from {least}")
    return int(value)


def _finite(metrics: Any) -> dict[str, float]:
    """Drop metrics that are not finite: one diverged score must not cost the update."""
    if not isinstance(metrics, Mapping):
        raise TaskError(f"the metrics of the learning task are {_kind(metrics)}, not numbers by name")
    values = {str(name): _number(name, value) for name, value in metrics.items()}
    kept = {name: value for name, value in values.items() if math.isfinite(value)}
    if len(kept) < len(values):
        log.warning("metrics not finite", names=sorted(values.keys() - kept.keys()))
    return kept


def _number(name: object, value: Any) -> float:
    """A number, or an array or tensor of no dimension; None, a score that is not defined, is NaN."""
    if value is None:
        return math.nan
    try:
        if isinstance(value, str | bytes | np.complexfloating) or np.ndim(value):
            raise TypeError
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise TaskError(f"metric {name!r} of the learning task is {_kind(value)}, not a number") from None


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"

"""Validation of what a trainer returns: a wrong type in users' code costs its task, never the worker.

Every function raises TaskError, in one line that says what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import structlog

from fedgrpc.codec.layout import Layout, TensorRole, layout_of
from fedgrpc.errors import EncodeError, TaskError, TaskUnfit
from fedgrpc.trainer import EvalResult, TrainResult, Weights

_MOST: Final = 1 << 63

log = structlog.get_logger()


def initial_weights(returned: Any) -> Weights:
    """Validate the result of `Trainer.initial_weights`."""
    return _arrays("initial_weights", returned)


def initial_layout(roles: Any, tied_names: Any, weights: Weights) -> Layout:
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


def train_result(returned: Any) -> TrainResult:
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
    )


def eval_result(returned: Any) -> EvalResult | None:
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

"""Admission: the checks that an update must pass before any of it is averaged.

Checks change nothing, and every refusal says in one line what was wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedgrpc import claims
from fedgrpc.errors import UpdateRefused

_PIECE = 1 << 15
_MOST_SQUARE = claims.MAX_TENSOR_NORM**2


class TensorLike(Protocol):
    """The properties of a tensor that admission compares."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def role(self) -> str: ...
    @property
    def is_trained(self) -> bool: ...


@dataclass(frozen=True)
class AdmissionPolicy:
    """Bounds on an update: the L2 norm of all its trained tensors together, and its count of examples."""

    max_norm: float = math.inf
    max_example_count: int = 1 << 40


def check_layout(model: Sequence[TensorLike], update: Sequence[TensorLike]) -> None:
    """Raise `UpdateRefused` unless both list the same tensors, in any order.

    An update may leave out tensors that are not parameters. The error names the first difference.
    """
    wanted = {tensor.name: tensor for tensor in model}
    given = {tensor.name: tensor for tensor in update}
    if len(given) < len(update):
        twice = min(name for name, count in Counter(tensor.name for tensor in update).items() if count > 1)
        raise UpdateRefused(f"tensor {twice!r} is listed twice")
    if missing := sorted(
        name for name, tensor in wanted.items() if tensor.role == "parameter" and name not in given
    ):
        raise UpdateRefused(f"tensor {missing[0]!r} is missing{_and_more(missing)}")
    if extra := sorted(given.keys() - wanted.keys()):
        raise UpdateRefused(f"the model has no tensor {extra[0]!r}{_and_more(extra)}")
    for name, tensor in given.items():
        mine, theirs = (tensor.dtype, tensor.shape), (wanted[name].dtype, wanted[name].shape)
        if mine != theirs:
            raise UpdateRefused(f"tensor {name!r} is {_text(*mine)}, the model's is {_text(*theirs)}")
        check_role(wanted[name], tensor)


def check_role(mine: TensorLike, given: TensorLike) -> None:
    """Raise `UpdateRefused` unless a tensor has the model's role, which decides how its values are read."""
    if mine.role != given.role:
        raise UpdateRefused(f"tensor {mine.name!r} is a {given.role}, the model's is a {mine.role}")


def check_counts(example_count: int, metrics: Mapping[str, float], policy: AdmissionPolicy) -> None:
    """Raise `UpdateRefused` unless an update has examples, within the bound, and its metrics are finite."""
    if not 1 <= example_count <= policy.max_example_count:
        raise UpdateRefused(f"example count {example_count} is not from 1 to {policy.max_example_count}")
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UpdateRefused(f"metric {name!r} is {value}")


def check_values(tensors: Iterable[tuple[TensorLike, np.ndarray]], policy: AdmissionPolicy) -> float:
    """Return the update's L2 norm over its trained tensors, read one tensor at a time.

    Raises `UpdateRefused` for a value that is not finite or far too large, and for a norm over the bound.
    """
    square = 0.0
    for tensor, values in tensors:
        if np.dtype(values.dtype).kind in "iub" or tensor.role == "constant":
            continue
        part = sum_of_squares(values)
        if not math.isfinite(part):
            raise UpdateRefused(f"tensor {tensor.name!r} has values that are not finite, or too large to square")
        if not tensor.is_trained:
            continue
        if part > _MOST_SQUARE:
            raise UpdateRefused(f"tensor {tensor.name!r} has a norm above {claims.MAX_TENSOR_NORM:g}")
        square += part
    norm = math.sqrt(square)
    if norm > policy.max_norm:
        raise UpdateRefused(f"the update's norm {norm:.6g} is over the bound {policy.max_norm:.6g}")
    return norm


def check_variances(tensors: Iterable[tuple[TensorLike, np.ndarray]]) -> None:
    """Refuse a variance with a value below zero: a network takes its root. Raises `UpdateRefused`."""
    for tensor, values in tensors:
        if values.size and values.min() < 0:
            raise UpdateRefused(f"tensor {tensor.name!r} is a variance and has values below zero")


def sum_of_squares(values: np.ndarray) -> float:
    """Return the sum of squares, taken in cache-sized pieces. Not finite if any value is not."""
    flat = values.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, _PIECE):
        total += _sum_of_squares(flat[start : start + _PIECE])
    return total


def _sum_of_squares(piece: np.ndarray) -> float:
    # einsum, since dot would wake BLAS's threads, which spin on cores that others need. A sum in float32 is good
    # enough for a bound, and faster. One that overflows is taken again in float64.
    if piece.dtype == np.float32:
        quick = float(np.einsum("i,i->", piece, piece))
        if math.isfinite(quick):
            return quick
    wide = piece.astype(np.float64)
    return float(np.einsum("i,i->", wide, wide))


def _and_more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _text(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"

"""The step of a recipe found from the bytes that its payload may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np

from fedgrpc.codec.encoding import Buffer
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.step import C_RANGE
from fedgrpc.errors import EncodeError

_TRIES = 8
# A payload that leaves less than this share of its budget is close enough.
_SPARE = 0.03


@dataclass(frozen=True)
class Fitted:
    """A recipe without a budget, and the bytes that it really makes of the tensors it was fitted to."""

    recipe: Recipe
    size_bytes: int


def fit(
    tensors: Mapping[str, Array],
    recipe: Recipe,
    budget_bytes: float,
    draw: Callable[[], np.random.Generator],
    known: Layout = (),
) -> Fitted:
    """The recipe with the smallest step, from its c on, whose payload of these tensors is at most `budget_bytes`;
    with the coarsest step where even that is larger.

    Each try really encodes, into nothing but a count. `draw` gives the same random numbers each time: a payload
    then written with them has the size that was found, to the byte. `known` as in `layout_of`.

    Raises EncodeError where there is no step.
    """
    default = recipe.default
    if not isinstance(default, Entropy):
        raise EncodeError(f"{default} has no step to fit to a budget; use entropy")

    def attempt(log_c: float) -> Fitted:
        step = replace(default, c=float(f"{math.exp(log_c):.4g}"), budget="")
        tried = replace(recipe, default=step)
        return Fitted(tried, _size(tensors, tried, draw(), known))

    finest, coarsest = math.log(default.c), math.log(max(C_RANGE[1], default.c))
    over = attempt(finest)
    if over.size_bytes <= budget_bytes or coarsest == finest:
        return over
    best = attempt(coarsest)
    if best.size_bytes > budget_bytes:
        return best
    return _between(attempt, budget_bytes, (finest, over), (coarsest, best))


def _between(
    attempt: Callable[[float], Fitted],
    budget_bytes: float,
    over: tuple[float, Fitted],
    under: tuple[float, Fitted],
) -> Fitted:
    """Interpolate the logarithm of the size over that of c; halve where the end that fits stays as it is."""
    for number in range(_TRIES):
        sizes = [math.log(max(1, found.size_bytes)) for _, found in (over, under)]
        share = (sizes[0] - math.log(max(1.0, (1 - _SPARE / 2) * budget_bytes))) / max(1e-9, sizes[0] - sizes[1])
        share = 0.5 if number % 2 else min(0.95, max(0.05, share))
        log_c = over[0] + share * (under[0] - over[0])
        found = attempt(log_c)
        if found.size_bytes > budget_bytes:
            over = log_c, found
        else:
            under = log_c, found
        if (1 - _SPARE) * budget_bytes <= under[1].size_bytes:
            break
    return under[1]


class _Counter:
    """A sink that keeps nothing."""

    def write(self, data: Buffer) -> int:
        return memoryview(data).nbytes


def _size(tensors: Mapping[str, Array], recipe: Recipe, rng: np.random.Generator, known: Layout) -> int:
    sink = cast(BinaryIO, cast(Any, _Counter()))
    return write_payload(tensors, recipe, sink, rng, known).size_bytes

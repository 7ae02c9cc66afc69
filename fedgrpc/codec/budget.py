"""Recipes made for a layout or for a link: mixed per tensor, or as fine as fits into so many bytes."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO, cast

import numpy as np

from fedgrpc.codec.encoding import Buffer, Encoding
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.codec.step import C_RANGE
from fedgrpc.errors import EncodeError

# Bisection of log c: 2^8 steps over the range are 3.5 % of c each, about 2 % of the bytes.
_BISECTIONS = 8


def mixed_recipe(layout: Layout, body: Encoding, last: Encoding, compression: Compression) -> Recipe:
    """`body` for the weights, `last` (finer) for the last of them, raw for vectors: norms and biases."""
    weights = [spec.name for spec in layout if spec.is_float and len(spec.shape) >= 2]
    vectors = [spec.name for spec in layout if spec.is_float and len(spec.shape) < 2]
    overrides: list[tuple[str, Encoding]] = [(glob.escape(name), Raw()) for name in vectors]
    overrides += [(glob.escape(name), last) for name in weights[-1:]]
    return Recipe(body, tuple(overrides), compression)


def recipe_for_budget(
    tensors: Mapping[str, Array], recipe: Recipe, budget_bytes: int, rng: np.random.Generator
) -> Recipe:
    """The recipe with the smallest step whose payload of these tensors is at most `budget_bytes`.

    The default must be `Entropy`; its c is set, everything else stays. Each try really encodes, on a copy
    of nothing but the bytes counted. Raises EncodeError when even the coarsest step does not fit.
    """
    if not isinstance(recipe.default, Entropy):
        raise EncodeError(f"{recipe.default} has no step to fit to a budget; use entropy")
    default = recipe.default
    seed = int(rng.integers(2**63))

    def with_c(log_c: float) -> Recipe:
        return replace(recipe, default=replace(default, c=float(f"{np.exp(log_c):.4g}"), distortion=0.0))

    low, high = (float(np.log(c)) for c in C_RANGE)
    if (least := _size(tensors, with_c(high), seed)) > budget_bytes:
        raise EncodeError(f"the update takes {least} bytes at the coarsest step, the budget is {budget_bytes}")
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _size(tensors, with_c(middle), seed) > budget_bytes:
            low = middle
        else:
            high = middle
    return with_c(high)


class _Counter:
    """A sink that keeps nothing."""

    def write(self, data: Buffer) -> int:
        return memoryview(data).nbytes


def _size(tensors: Mapping[str, Array], recipe: Recipe, seed: int) -> int:
    sink = cast(BinaryIO, cast(Any, _Counter()))
    return write_payload(tensors, recipe, sink, np.random.default_rng(seed)).size_bytes

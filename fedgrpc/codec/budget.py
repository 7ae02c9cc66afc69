"""Bits that a recipe takes: expected of an update, measured against its entropy, fitted to a budget in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

import numpy as np

from fedgrpc.codec.encoding import Buffer, Encoding
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, Layout, TensorSpec, spec_of
from fedgrpc.codec.payload import PayloadWriter, write_payload
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.codec.rounding import C_RANGE
from fedgrpc.errors import EncodeError

_TRIES = 8
# A payload that leaves less than this share of its budget unused is close enough.
_SPARE = 0.03
# Elements whose bits tell what others of the same distribution take.
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Fitted:
    """A recipe without a budget, and the size of the payload that it makes of the tensors it was fitted to."""

    recipe: Recipe
    size_bytes: int


def fit(
    tensors: Mapping[str, Array],
    recipe: Recipe,
    budget_bytes: float,
    draw: Callable[[], np.random.Generator],
    known: Layout = (),
) -> Fitted:
    """Return the recipe with the smallest step, from its c on, whose payload has at most `budget_bytes`.

    If even the coarsest step makes a larger payload, return that. Each try really encodes and counts the bytes.
    `draw` must give the same random numbers each time, so that a payload written with them has exactly the size
    found. `known` as in `layout_of`. Raises EncodeError for an encoding without a step.
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
    """Search between a step that is over the budget and one under it.

    Interpolate the logarithm of the size over that of c. Every second try halves the interval instead, since
    interpolation alone may approach from one side only.
    """
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
    """A sink that keeps nothing: `PayloadWriter` counts the bytes itself."""

    def write(self, data: Buffer) -> int:
        return memoryview(data).nbytes


def _size(tensors: Mapping[str, Array], recipe: Recipe, rng: np.random.Generator, known: Layout) -> int:
    sink = cast(BinaryIO, cast(Any, _Counter()))
    return write_payload(tensors, recipe, sink, rng, known).size_bytes


@runtime_checkable
class HasSymbols(Protocol):
    """An encoding that can return the integers it codes."""

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """Return the integers whose order-0 entropy is the yardstick."""


@dataclass(frozen=True)
class Efficiency:
    """Bits per element: the order-0 entropy, the encoded content, and what is on the wire.

    The symbols are an encoding's quantized codes where it has them, else the content's bytes.
    """

    entropy_bits: float
    content_bits: float
    wire_bits: float

    @property
    def ratio(self) -> float:
        """Return wire over entropy; infinite where all symbols are equal.

        Below 1, the encoding finds structure beyond single symbols. Far above 1, it wastes bits.
        """
        return self.wire_bits / self.entropy_bits if self.entropy_bits else math.inf


def order0_bits(symbols: Array) -> float:
    """Return the order-0 entropy of the symbols, in bits per symbol."""
    if not symbols.size:
        return 0.0
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / symbols.size
    return float(-(shares * np.log2(shares)).sum())


def measure(array: Array, encoding: Encoding, compression: Compression, rng: np.random.Generator) -> Efficiency:
    """Encode one non-empty tensor and compare its size with its entropy."""
    spec = spec_of("tensor", array)
    data = memoryview(encoding.encode(array, rng)).cast("B")
    symbols = encoding.symbols(data, spec) if isinstance(encoding, HasSymbols) else np.frombuffer(data, np.uint8)
    entropy_bits = order0_bits(symbols) * symbols.size / spec.size
    writer = PayloadWriter(BytesIO(), compression)
    writer.add(spec, encoding, data)
    wire_bytes = writer.finish().size_bytes
    return Efficiency(entropy_bits, 8 * data.nbytes / spec.size, 8 * wire_bytes / spec.size)


def expected_bits(recipe: Recipe, elements: int) -> float:
    """Return the bits per element expected on the wire for an update of `elements`, as if its values were normal.

    A budget in bytes bounds them. One that follows the link is not known here.
    """
    bits = _bits_of_normal(str(recipe.without_budget()))
    known = recipe.budget.isdecimal() and elements > 0
    return min(bits, 8 * int(recipe.budget) / elements) if known else bits


@lru_cache(maxsize=64)
def _bits_of_normal(recipe: str) -> float:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((_SAMPLE // 256, 256), np.float32)
    manifest = write_payload({"tensor": values}, Recipe.parse(recipe), BytesIO(), rng)
    return 8 * manifest.size_bytes / values.size

"""How far a compressed tensor stands from the order-0 entropy of its symbols.

The symbols are an encoding's quantized codes where it has them, else the content's bytes. An encoding
below 1 in `ratio` finds structure beyond single symbols; one far above it wastes bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Protocol, runtime_checkable

import numpy as np

from fedgrpc.codec.encoding import Encoding
from fedgrpc.codec.layout import Array, TensorSpec, spec_of
from fedgrpc.codec.payload import PayloadWriter, write_payload
from fedgrpc.codec.recipe import Compression, Recipe

_SAMPLE = 1 << 16


@runtime_checkable
class HasSymbols(Protocol):
    """An encoding that can name the integers it codes."""

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """Integers whose order-0 entropy is the yardstick."""


@dataclass(frozen=True)
class Efficiency:
    """Bits per element: the order-0 entropy, the encoded content, and what is on the wire."""

    entropy_bits: float
    content_bits: float
    wire_bits: float

    @property
    def ratio(self) -> float:
        """Wire over entropy; infinite where all symbols are equal."""
        return self.wire_bits / self.entropy_bits if self.entropy_bits else math.inf


def order0_bits(symbols: Array) -> float:
    """Order-0 entropy of the symbols, in bits for each of them."""
    if not symbols.size:
        return 0.0
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / symbols.size
    return float(-(shares * np.log2(shares)).sum())


def measure(array: Array, encoding: Encoding, compression: Compression, rng: np.random.Generator) -> Efficiency:
    """Encode one non-empty tensor and compare what comes out with its entropy."""
    spec = spec_of("tensor", array)
    data = memoryview(encoding.encode(array, rng)).cast("B")
    symbols = encoding.symbols(data, spec) if isinstance(encoding, HasSymbols) else np.frombuffer(data, np.uint8)
    entropy_bits = order0_bits(symbols) * symbols.size / spec.size
    writer = PayloadWriter(BytesIO(), compression)
    writer.add(spec, encoding, data)
    wire_bytes = writer.finish().size_bytes
    return Efficiency(entropy_bits, 8 * data.nbytes / spec.size, 8 * wire_bytes / spec.size)


def expected_bits(recipe: Recipe, elements: int) -> float:
    """Bits on the wire for each of an update's `elements`, before there is an update: those of normal values.

    A budget in bytes bounds them; one that goes by a link is not known here.
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

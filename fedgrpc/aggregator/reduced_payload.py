"""Payloads of pruned and clustered models: the recipe that writes them, and the bits to expect of it.

The rule: a price is that of the recipe that really writes the payload, for a tensor of normal values.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from io import BytesIO
from typing import Final

import numpy as np

from fedgrpc.codec.codebook import Codebook
from fedgrpc.codec.encoding import Encoding
from fedgrpc.codec.layout import TensorSpec, spec_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.sparse import Threshold
from fedgrpc.codec.uniform import Uniform
from fedgrpc.submodels.reduction import ReducedTensors, Reduction

# Of a tensor's RMS: what is below is as good as zero.
_ANYTHING: Final = 1e-6
# Pruning ratio from which marks pay: `tools.bench.reduced_bytes`.
_MARKS_PAY: Final = 0.6
# Elements whose bits tell what those of a larger tensor take.
_SAMPLE: Final = 1 << 16


def reduced_recipe(recipe: Recipe, reducible: Sequence[TensorSpec], reduction: Reduction) -> Recipe:
    """Return the recipe for tensors with few different values, or with many zeros, which only marks stand for."""
    overrides: list[tuple[str, Encoding]] = []
    for spec in reducible:
        encoding, axes = recipe.for_tensor(spec), len(spec.shape)
        if encoding == Raw():
            continue
        if reduction.clusters(spec.name, axes):
            overrides.append((glob.escape(spec.name), Codebook()))
        elif reduction.prunes(spec.name, axes) and isinstance(encoding, Uniform) and _is_sparse(reduction):
            overrides.append((glob.escape(spec.name), Threshold(_ANYTHING, encoding.bits)))
    return replace(recipe, overrides=(*overrides, *recipe.overrides))


def _is_sparse(reduction: Reduction) -> bool:
    """Whether so much is pruned that marks of what is left take fewer bytes than zeros do after zstd."""
    return reduction.pruning is not None and reduction.pruning.ratio > _MARKS_PAY


def reduced_bits(recipe: Recipe) -> Callable[[int, Reduction], float]:
    """Return a function from a tensor's elements, and how it is reduced, to the bits of each on the wire."""
    return partial(_priced, str(recipe.without_budget()))


def _priced(text: str, elements: int, reduction: Reduction) -> float:
    return _bits_of_normal(text, min(elements, _SAMPLE), reduction)


@lru_cache(maxsize=512)
def _bits_of_normal(text: str, elements: int, reduction: Reduction) -> float:
    rng = np.random.default_rng(0)
    tensors = {"tensor": rng.standard_normal((max(1, elements), 1), np.float32)}
    spec = spec_of("tensor", tensors["tensor"])
    recipe = Recipe.parse(text).for_layout((spec,))
    reduced = ReducedTensors(tensors, reduction, tensors.keys())
    manifest = write_payload(dict(reduced), reduced_recipe(recipe, (spec,), reduction), BytesIO(), rng)
    return 8 * manifest.size_bytes / spec.size

"""Means of tensors over the updates of one commit, where these differ in what they cover, are or may say.

The rule: updates are read one after the other, in slot order, and the same updates give the same bits. What all
updates cover whole is folded faster (fedgrpc.aggregator.fold).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np

from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.aggregation.partial_aggregate import add_partial_aggregate
from fedgrpc.aggregation.partial_update import coverage_of, unpack
from fedgrpc.aggregation.spread import Spread
from fedgrpc.aggregator.fold import Load
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.errors import blaming
from fedgrpc.runs.merge import Merge
from fedgrpc.submodels.coverage import Coverage

# Every group of tensors asks for all manifests. Those of a thousand updates may take gigabytes.
_CACHED_MANIFESTS = 64


def means_of(
    specs: Sequence[TensorSpec],
    merge: Merge,
    load: Load,
    base: Callable[[str], np.ndarray],
) -> list[CoordinateMean]:
    """The mean of each of these tensors over the updates of `merge`.

    `base` gives a tensor of the base model by its name. A buffer that only some updates have is as it was to the
    others: who sends one that nobody else has changed does not decide alone what it becomes.
    """
    means = [CoordinateMean(spec.shape) for spec in specs]
    # Several updates may ask for the same tensor of the base, most ask for none.
    base = cache(base)
    sub_models, merged, scales = merge.sub_models, merge.merged, merge.scales
    sent = {spec.name for token in merge.weights for spec in load(token).manifest.layout}
    clipped = [spec for spec in specs if not spec.is_trained and spec.name in sent] if merge.clips_buffers else []
    # The spread of all comes first: no update is added before it is known what the others say.
    spreads = _spreads(clipped, merge, load, base) if clipped else {}
    for token, weight in merge.weights.items():
        with blaming(token), load(token).open() as reader:
            for spec, mean in zip(specs, means, strict=True):
                # What is not a difference but a value stays what it is.
                scale = scales.get(token, 1.0) if spec.is_trained else 1.0
                spread = spreads.get(spec.name)
                if spec.name not in reader.names:
                    if spec.name in sent and not spec.is_trained and not merge.lacks(token, spec.name):
                        _add_unchanged(mean, base(spec.name), weight, coverage_of(spec, sub_models.get(token)))
                elif token in merged:
                    read = reader.tensor if spread is None else _clipping(spec.name, spread, reader.tensor)
                    add_partial_aggregate(mean, spec, reader.names, read, merged[token], weight, scale)
                elif token not in sub_models:
                    values = reader.tensor(spec.name)
                    mean.add(values if spread is None else spread.clipped(values), weight, scale=scale)
                else:
                    whole = coverage_of(spec, sub_models[token])
                    values, coverage = unpack(spec.name, reader.names, reader.tensor, whole)
                    values = values if spread is None else spread.clipped(values, coverage)
                    mean.add(values, weight, coverage, scale=scale)
    return means


def _spreads(
    buffers: Sequence[TensorSpec], merge: Merge, load: Load, base: Callable[[str], np.ndarray]
) -> dict[str, Spread]:
    """Return the values of each of these buffers in the base and in the updates."""
    spreads = {spec.name: Spread(base(spec.name)) for spec in buffers}
    for token in merge.weights:
        with blaming(token), load(token).open() as reader:
            for spec in buffers:
                whole = coverage_of(spec, merge.sub_models.get(token))
                if spec.name in reader.names:
                    spreads[spec.name].add(*unpack(spec.name, reader.names, reader.tensor, whole))
                elif not merge.lacks(token, spec.name):
                    spreads[spec.name].add(whole.take(base(spec.name)), whole)
    return spreads


def _clipping(name: str, spread: Spread, read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """`read`, with the tensor of that name within its spread."""
    return lambda each: spread.clipped(read(each)) if each == name else read(each)


def _add_unchanged(mean: CoordinateMean, base: np.ndarray, weight: float, coverage: Coverage) -> None:
    """Add what `coverage` has of a buffer as it was; NaN, a value without any measurement yet, does not count."""
    values = coverage.take(base)
    if (unknown := np.isnan(values)).any():
        coverage = coverage.masked(~unknown)
        values = coverage.take(base)
    mean.add(values, weight, coverage)


def cached(load: Load) -> Load:
    """`load`, with the manifests of the last updates kept: every group of tensors asks for all of them."""
    return lru_cache(maxsize=_CACHED_MANIFESTS)(load)

"""Packed updates and means of updates with values that a peer may send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import ml_dtypes
import numpy as np

from fedgrpc.aggregation import partial_aggregate, partial_update
from fedgrpc.aggregation.admission import AdmissionPolicy, check_values
from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.codec.layout import TensorSpec
from tests.fuzz.payloads import LAYOUT
from tests.fuzz.registry import target

_FLOATS: Final = (0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, 0.5, 0.25, 2.0)


def _values(spec: TensorSpec, rnd: Random) -> np.ndarray:
    dtype = spec.numpy_dtype
    if dtype.kind == "f" or dtype == ml_dtypes.bfloat16:
        numbers: list[Any] = [rnd.choice(_FLOATS) for _ in range(spec.size)]
    elif dtype.itemsize == 1:
        numbers = [rnd.choice((0, 1, 127, 128, 255)) % (2 if dtype.kind == "b" else 256) for _ in range(spec.size)]
    else:
        numbers = [rnd.choice((0, -1, 2**63 - 1, -(2**63))) for _ in range(spec.size)]
    return np.array(numbers, dtype).reshape(spec.shape)


@target(share=20)
def packed_updates(rnd: Random, folder: Path) -> None:
    masked, clustered = rnd.random() < 0.7, rnd.random() < 0.7
    update = [each for spec in LAYOUT for each in _packed(spec, masked, clustered, rnd)]
    data = {spec.name: _values(spec, rnd) for spec in update}
    partial_update.check_layout(LAYOUT, update, None, masked, clustered)
    check_values(partial_update.unpack_all(LAYOUT, data.keys(), data.__getitem__, None), AdmissionPolicy())
    for spec in LAYOUT:
        mean = CoordinateMean(spec.shape)
        values, coverage = partial_update.unpack(
            spec.name, data.keys(), data.__getitem__, partial_update.coverage_of(spec, None)
        )
        mean.add(values, 2.0, coverage)
        if not mean.covers_nothing:
            mean.result()


def _packed(spec: TensorSpec, masked: bool, clustered: bool, rnd: Random) -> Iterator[TensorSpec]:
    mask, codes = masked and rnd.random() < 0.8, clustered and rnd.random() < 0.8
    count = rnd.choice((0, 1, 2, 5, 30, 256, spec.size, rnd.randrange(spec.size + 1)))
    yield TensorSpec(spec.name, spec.dtype, (count,) if mask or codes else spec.shape)
    if mask:
        yield TensorSpec(spec.name + partial_update.MASK, "uint8", ((spec.size + 7) // 8,))
    if codes:
        elements = rnd.randrange(spec.size + 1) if mask else spec.size
        size = (elements * partial_update.code_bits(max(1, count)) + 7) // 8
        yield TensorSpec(spec.name + partial_update.CODES, "uint8", (size,))


@target(share=20)
def means(rnd: Random, folder: Path) -> None:
    update = [each for spec in LAYOUT if rnd.random() < 0.85 for each in _merged(spec, rnd)]
    weight = rnd.choice((1.0, 1e12, 1e-300))
    data = {spec.name: _bounded(spec, _values(spec, rnd), weight, rnd) for spec in update}
    partial_aggregate.check_partial_aggregate(LAYOUT, update)
    check_values(
        partial_aggregate.partial_aggregate_values(LAYOUT, data.keys(), data.__getitem__, weight),
        AdmissionPolicy(),
    )
    for spec in LAYOUT:
        mean = CoordinateMean(spec.shape)
        partial_aggregate.add_partial_aggregate(mean, spec, data.keys(), data.__getitem__, weight, 3.0)
        if not mean.covers_nothing:
            mean.result()


def _merged(spec: TensorSpec, rnd: Random) -> Iterator[TensorSpec]:
    yield spec
    kind = rnd.random()
    if kind < 0.3:
        yield TensorSpec(spec.name + partial_aggregate.WEIGHTS, "float64", spec.shape)
    elif kind < 0.7:
        count = rnd.choice((1, 2, 3, 256, 200))
        yield TensorSpec(spec.name + partial_aggregate.WEIGHTS, "float64", (count,))
        size = (spec.size * partial_update.code_bits(count) + 7) // 8
        yield TensorSpec(spec.name + partial_aggregate.WEIGHTS + partial_update.CODES, "uint8", (size,))
    if rnd.random() < 0.5:
        yield TensorSpec(spec.name + partial_aggregate.REST, "float64", spec.shape)


def _bounded(spec: TensorSpec, values: np.ndarray, weight: float, rnd: Random) -> np.ndarray:
    """Half of the time what admission takes, so that the mean is computed, too."""
    if rnd.random() < 0.1:
        return values
    if spec.name.endswith(partial_aggregate.WEIGHTS):
        return np.abs(values).clip(0, weight)
    return values.clip(-0.5, 0.5) if spec.name.endswith(partial_aggregate.REST) else values

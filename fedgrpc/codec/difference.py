"""What changed between two arrays, in their own dtype; the same on both sides of the wire.

    float                difference = new - old,  new = old + difference  (up to one rounding)
    integers and bool    the new value itself: counters such as BatchNorm's `num_batches_tracked`, masks

A mean of counters is a mean of their values, and a difference of bool or unsigned values would have no sign.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array


def subtract(new: Array, old: Array) -> Array:
    """`new` as a difference to `old`: what travels."""
    if not _is_float(new):
        return new
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.subtract(new, old, dtype=new.dtype))


def add(old: Array, change: Array) -> Array:
    """`old` with what travelled: the same bits wherever it is computed."""
    if not _is_float(old):
        return change
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.add(old, change, dtype=old.dtype))


def _is_float(array: Array) -> bool:
    return array.dtype.kind not in "iub"

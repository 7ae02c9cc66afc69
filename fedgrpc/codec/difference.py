"""What changed of a tensor, in its own dtype; the same on both sides of the wire.

    trained floats      difference = new - old,  new = old + difference  (up to one rounding)
    all others          the new value itself: statistics, counters, masks

A mean of values stays where the values are: of variances it is no less than the least. A sum of differences, each
rounded, may leave that domain; and a difference of bool or unsigned values would have no sign.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.layout import Array, TensorRole, TensorSpec
from fedgrpc.codec.values import flat


def subtract(spec: TensorSpec, new: Array, old: Array) -> Array:
    """What travels of `new` to those who have `old`."""
    if not spec.is_trained:
        return new
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.subtract(new, old, dtype=new.dtype))


def add(spec: TensorSpec, old: Array, change: Array) -> Array:
    """`old` with what travelled: the same bits wherever it is computed."""
    if not spec.is_trained:
        return change
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.add(old, change, dtype=old.dtype))


def left_out(spec: TensorSpec, new: Array, old: Array) -> bool:
    """Whether a difference or an update leaves the tensor out: it is no parameter, and has not changed."""
    return spec.role is not TensorRole.PARAMETER and np.array_equal(
        flat(new).view(np.uint8), flat(old).view(np.uint8)
    )

"""Residuals of every kind of tensor, and whether two of them are equal."""

import ml_dtypes
import numpy as np

from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import layout_of


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.normal(size=(64, 8)).astype(np.float32),
        "half": rng.normal(size=100).astype(ml_dtypes.bfloat16),
        "bias": np.array(2.5, np.float64),
        "none": np.zeros((0, 4), np.float32),
    }


def residual_of(arrays):
    return Residual(layout_of(arrays), arrays)


def equal(left, right):
    return left.layout == right.layout and all(
        np.array_equal(left.tensors[name], right.tensors[name]) for name in left.tensors
    )

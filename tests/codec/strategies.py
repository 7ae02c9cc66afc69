"""Hypothesis strategies for tensors and encodings."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgrpc.codec.layout import Array

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
OTHER_DTYPES = ("int64", "int32", "int16", "int8", "uint8", "bool")


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@st.composite
def float_arrays(draw: st.DrawFn, dtypes: tuple[str, ...] = FLOAT_DTYPES, max_size: int = 3000) -> Array:
    """Gaussian, Laplace, sparse, constant or hand-picked values; some 0-d, empty, transposed or strided."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.one_of(st.just(()), hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40)))
    if int(np.prod(shape)) > max_size:
        shape = (max_size,)
    scale = 10.0 ** draw(st.integers(-6, 3))
    kind = draw(st.sampled_from(("gauss", "laplace", "sparse", "constant", "zero")))
    makers: dict[str, Callable[[], Array]] = {
        "gauss": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape),
        "sparse": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.02),
        "constant": lambda: np.ones(shape),
        "zero": lambda: np.zeros(shape),
    }
    array = np.asarray(makers[kind]() * scale).astype(numpy_dtype(draw(st.sampled_from(dtypes))))
    if array.ndim >= 2 and draw(st.booleans()):
        array = array.T
    if array.ndim >= 1 and draw(st.booleans()):
        array = array[::2]
    return array


def other_arrays() -> st.SearchStrategy[Array]:
    return st.sampled_from(OTHER_DTYPES).flatmap(
        lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    )

from __future__ import annotations

import numpy as np
import pytest

from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.codec.shuffle import BLOCK, shuffle, unshuffle
from tests.codec.strategies import numpy_dtype


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK, 2 * BLOCK + 77])
def test_shuffling_equals_transposing_the_bytes_of_each_block(dtype: str, size: int) -> None:
    values: Array = np.random.default_rng(0).standard_normal(size).astype(numpy_dtype(dtype))
    blocks = [values[start : start + BLOCK] for start in range(0, size, BLOCK)]
    naive = b"".join(block.view(np.uint8).reshape(block.size, -1).T.tobytes() for block in blocks)
    shuffled = shuffle(values)
    assert shuffled.tobytes() == naive
    assert unshuffle(shuffled, values.dtype).tobytes() == values.tobytes()
    data = Raw(shuffle=True).encode(values, np.random.default_rng(0))
    assert Raw(shuffle=True).decode(data, spec_of("x", values)).tobytes() == values.tobytes()


def test_floats_are_shuffled_only_before_compression() -> None:
    spec = spec_of("x", np.zeros(100, np.float32))
    assert Recipe.parse("raw").for_tensor(spec) == Raw()
    assert Recipe.parse("raw+zstd").for_tensor(spec) == Raw(shuffle=True)
    assert str(Recipe.parse("float16+zstd").for_tensor(spec)) == "float16:shuffle=yes"
    assert Recipe.parse("raw+zstd").compression == Compression("zstd")

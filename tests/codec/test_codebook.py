"""A codebook loses nothing, and takes the bytes that few values need."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.codebook import Codebook
from fedgrpc.codec.layout import spec_of
from fedgrpc.errors import CorruptError, LayoutError

RNG = np.random.default_rng(0)


@given(st.integers(0, 40_000), st.integers(1, 300), st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]))
def test_every_value_comes_back_as_it_was(size: int, different: int, dtype: type) -> None:
    rng = np.random.default_rng([size, different])
    values = rng.standard_normal(different).astype(dtype)[rng.integers(0, different, size)]
    spec = spec_of("x", values)
    data = memoryview(Codebook().encode(values, rng))
    least, most = Codebook().size_bounds(spec)
    assert least <= data.nbytes <= most
    assert Codebook().decode(data, spec).tobytes() == values.tobytes()


def test_a_zero_keeps_its_sign() -> None:
    values = np.array([0.0, -0.0, 1.0] * 40, np.float32)
    assert Codebook().decode(memoryview(Codebook().encode(values, RNG)), spec_of("x", values)).tobytes() == (
        values.tobytes()
    )


@pytest.mark.parametrize(("different", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 6), (64, 6), (65, 8)])
def test_an_element_takes_the_bits_of_its_code(different: int, bits: int) -> None:
    values = np.arange(different, dtype=np.float32)[np.arange(8000) % different]
    assert len(Codebook().encode(values, RNG)) == 2 + 4 * different + 1000 * bits


def test_bytes_that_no_encoder_writes_are_refused() -> None:
    values = np.array([1.0, 2.0, 3.0] * 20, np.float32)
    spec, data = spec_of("x", values), bytearray(Codebook().encode(values, RNG))
    with pytest.raises(LayoutError):
        Codebook().decode(memoryview(data[:1]), spec)
    with pytest.raises(LayoutError):
        Codebook().decode(memoryview(data[:-1]), spec)
    data[-1] |= 0xC0
    with pytest.raises(CorruptError, match="beyond its 3 values"):
        Codebook().decode(memoryview(data), spec)
    data[:2] = (257).to_bytes(2, "little")
    with pytest.raises(CorruptError, match="257 values"):
        Codebook().decode(memoryview(data), spec)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.packing import pack, packed_size, unpack


@given(st.sampled_from((2, 3, 4, 6, 8)), st.integers(0, 300), st.integers(0))
def test_packing_equals_writing_the_bits_one_by_one(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    stream = (codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    naive = np.packbits(stream.reshape(-1), bitorder="little")
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, naive)
    assert packed.size == packed_size(count, bits)
    np.testing.assert_array_equal(unpack(packed, count, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_unpacking_reads_from_any_alignment(bits: int) -> None:
    codes = np.arange(100, dtype=np.uint8) % (1 << bits)
    shifted = np.concatenate([np.zeros(1, np.uint8), pack(codes, bits)])[1:]
    np.testing.assert_array_equal(unpack(shifted, 100, bits), codes)

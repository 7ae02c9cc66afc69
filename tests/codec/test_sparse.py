from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.sparse import Threshold, TopK
from tests.codec.strategies import float_arrays


def round_trip(encoding: TopK | Threshold, array: Array) -> Array:
    data = encoding.encode(array, np.random.default_rng(0))
    return encoding.decode(data, spec_of("x", array))


@given(float_arrays(("float32",)), st.sampled_from((0.001, 0.02, 0.3, 1.0)))
def test_top_k_keeps_exactly_the_k_largest_and_zeroes_the_rest(array: Array, fraction: float) -> None:
    decoded = round_trip(TopK(fraction), array).reshape(-1)
    values = np.ascontiguousarray(array).reshape(-1)
    k = max(1, round(fraction * values.size)) if values.size else 0
    kept = np.sort(np.argsort(-np.abs(values), kind="stable")[:k])
    wanted = np.zeros_like(values)
    wanted[kept] = values[kept]
    # An int8 block of 256 values errs by at most half a step of the largest.
    largest = np.abs(values).max(initial=0)
    assert np.abs(decoded - wanted).max(initial=0) <= largest / 254 * 1.001 + 1e-30


def test_a_threshold_keeps_what_reaches_so_many_times_the_rms() -> None:
    array = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    decoded = round_trip(Threshold(2.5), array)
    rms = np.sqrt((array.astype(np.float64) ** 2).mean())
    np.testing.assert_array_equal(decoded != 0, np.abs(array) >= 2.5 * rms)
    assert round_trip(Threshold(2.5), np.zeros(100, np.float32)).any() == np.False_


@pytest.mark.parametrize("fraction", [0.005, 0.01, 0.1])
def test_indices_cost_little_more_than_their_entropy(fraction: float) -> None:
    import zstandard

    array = np.random.default_rng(1).standard_normal(1_000_000).astype(np.float32)
    data = TopK(fraction).encode(array, np.random.default_rng(0))
    size_of_marks = int.from_bytes(data[4:8], "little")
    wire_bits = 8 * len(zstandard.ZstdCompressor(level=1).compress(data[8 : 8 + size_of_marks]))
    entropy_bits = 1_000_000 * -(fraction * np.log2(fraction) + (1 - fraction) * np.log2(1 - fraction))
    assert wire_bits < 1.05 * entropy_bits


@pytest.mark.parametrize("encoding", [TopK(0.1, bits=4), Threshold(2.0)])
def test_the_symbols_are_the_codes_and_one_for_what_is_not_kept(encoding: TopK | Threshold) -> None:
    array = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    data = encoding.encode(array, np.random.default_rng(0))
    symbols = encoding.symbols(data, spec_of("x", array))
    kept = symbols != 1 << encoding.bits
    np.testing.assert_array_equal(kept, encoding.decode(data, spec_of("x", array)) != 0)
    # Codes are in two's complement, and have the signs of what they stand for.
    np.testing.assert_array_equal(symbols[kept] >= 1 << (encoding.bits - 1), array[kept] < 0)

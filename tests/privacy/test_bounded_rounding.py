"""Rounding within a norm, and sums that one device moves by no more than that, whatever others send."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.privacy.bounded_rounding import clip_norm, folded, grid_bound, squared_length
from fedgrpc.privacy.fixed_point import FixedPoint


@pytest.mark.parametrize("size", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_an_update_of_the_clip_norm_is_within_its_norm_once_it_is_rounded(size: int, bits: int) -> None:
    norm, rng = 3.0, np.random.default_rng(size + bits)
    grid = FixedPoint(grid_bound(norm, size, bits), bits, 0, 3)
    before = clip_norm(norm, grid.step, size)
    assert norm / 2 <= before < norm
    for shape in (rng.standard_normal(size), np.ones(size), np.eye(1, size)[0]):
        update = shape / np.linalg.norm(shape) * before
        integers = grid.encode(update, 1, rng)
        assert math.sqrt(squared_length(integers, bits)) * grid.step / 2 <= norm


def test_rounding_takes_three_percent_of_the_length_of_a_large_update() -> None:
    grid = FixedPoint(grid_bound(1.0, 1_000_000, 8), 8, 0, 16)
    assert clip_norm(1.0, grid.step, 1_000_000) == pytest.approx(math.sqrt(15 / 16), rel=0.003)
    # Values reach 64 times what all would have in an update of that length.
    assert grid.bound == pytest.approx(64 / 1000, rel=0.005)


def test_the_length_is_that_of_the_values_that_integers_stand_for() -> None:
    grid = FixedPoint(0.5, 6, 0, 3)
    integers = grid.encode(np.linspace(-0.6, 0.6, 100), 1, np.random.default_rng(1))
    values = integers * grid.step - grid.bound
    assert math.sqrt(squared_length(integers, 6)) * grid.step / 2 == pytest.approx(np.linalg.norm(values))


@given(st.integers(1, 9), st.integers(2, 10), st.integers(0, 2**32))
def test_sums_of_honest_devices_are_as_they_are(count: int, bits: int, seed: int) -> None:
    grid = FixedPoint(1.0, bits, 0, count, spare_bits=1)
    integers = np.random.default_rng(seed).integers(0, 1 << bits, (count, 50)).astype(np.uint64)
    integers[:, 0], integers[:, 1] = 0, (1 << bits) - 1
    total = integers.sum(0) % (1 << grid.sum_bits)
    doubled = 2 * integers.astype(np.int64) - ((1 << bits) - 1)
    assert np.array_equal(folded(total, count, bits, grid.sum_bits), doubled.sum(0))


@pytest.mark.parametrize(("bits", "count"), [(2, 3), (3, 4), (4, 5)])
def test_a_device_moves_no_sum_further_than_its_update_is_long_whatever_the_others_sent(
    bits: int, count: int
) -> None:
    """All sums that there may be, with and without a device that adds each integer that there may be."""
    modulus = 1 << (sum_bits := FixedPoint(1.0, bits, 0, count, spare_bits=1).sum_bits)
    others = np.arange(modulus)
    for integer in range(1 << bits):
        without = folded(others, count - 1, bits, sum_bits)
        moved = folded((others + integer) % modulus, count, bits, sum_bits) - without
        assert np.abs(moved).max() <= abs(2 * integer - ((1 << bits) - 1))
    # Without the fold some would be moved by nearly the modulus.
    plain = 2 * ((others + 1) % modulus - others) - 1
    assert np.abs(plain).max() > modulus

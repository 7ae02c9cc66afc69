"""Fixed point grids and packed words of a secure sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import CorruptError, EncodeError, UpdateRefused, UsageError
from fedgrpc.privacy.fixed_point import FixedPoint
from fedgrpc.privacy.masks import Masks, pack_words, packed_bytes, unpack_words


class TestFixedPoint:
    @given(
        bits=st.integers(2, 12),
        weights=st.lists(st.integers(1, 255), min_size=1, max_size=20),
        seed=st.integers(0, 2**32),
    )
    def test_the_mean_of_the_sum_is_the_mean_of_the_values_within_a_step(
        self, bits: int, weights: list[int], seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        grid = FixedPoint(bound=0.5, bits=bits, weight_bits=8, count=len(weights))
        values = rng.uniform(-0.5, 0.5, (len(weights), 30))
        total = sum(grid.encode(row, weight, rng) for row, weight in zip(values, weights, strict=True))
        assert int(np.max(total)).bit_length() <= grid.sum_bits
        mean = np.average(values, axis=0, weights=weights)
        assert np.abs(grid.mean(np.asarray(total), sum(weights)) - mean).max() <= grid.step * (1 + 1e-9)

    def test_rounding_has_no_bias(self) -> None:
        grid = FixedPoint(bound=1.0, bits=2, weight_bits=0, count=1)
        drawn = grid.encode(np.full(200_000, 0.123), 1, np.random.default_rng(0))
        assert grid.mean(drawn, 1).mean() == pytest.approx(0.123, abs=0.004)

    def test_values_beyond_the_bound_are_clipped_to_it(self) -> None:
        grid = FixedPoint(bound=1.0, bits=8, weight_bits=0, count=1)
        ends = grid.mean(grid.encode(np.array([-7.0, 7.0]), 1, np.random.default_rng(0)), 1)
        assert ends.tolist() == pytest.approx([-1.0, 1.0])

    @pytest.mark.parametrize("weight", [0, -1, 256])
    def test_a_weight_that_does_not_fit_is_refused(self, weight: int) -> None:
        with pytest.raises(EncodeError, match="weight"):
            FixedPoint(1.0, 8, 8, 4).encode(np.zeros(3), weight, np.random.default_rng(0))

    def test_values_that_are_no_numbers_are_refused(self) -> None:
        with pytest.raises(EncodeError, match="NaN"):
            FixedPoint(1.0, 8, 0, 1).encode(np.array([np.nan]), 1, np.random.default_rng(0))

    @pytest.mark.parametrize("wrong", [(0.0, 8, 0, 1), (np.inf, 8, 0, 1), (1.0, 1, 0, 1), (1.0, 24, 32, 2000)])
    def test_a_grid_that_cannot_be_is_refused(self, wrong: tuple[float, int, int, int]) -> None:
        with pytest.raises(UsageError, match="secure sum"):
            FixedPoint(*wrong)

    @pytest.mark.parametrize(("total", "weight"), [(256, 1), (1021, 4), (0, 0), (0, 5)])
    def test_sums_that_no_honest_devices_make_are_refused(self, total: int, weight: int) -> None:
        with pytest.raises(UpdateRefused, match="secure sum"):
            FixedPoint(1.0, 8, 0, 4).mean(np.array([3, total], np.uint64), weight)


class TestPackedWords:
    @given(bits=st.integers(1, 56), count=st.integers(0, 40), seed=st.integers(0, 99))
    def test_words_come_back_and_their_bits_stand_one_after_another(
        self, bits: int, count: int, seed: int
    ) -> None:
        words = np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=np.uint64)
        packed = pack_words(words, bits)
        assert packed.size == packed_bytes(count, bits)
        naive = sum(int(word) << (bits * place) for place, word in enumerate(words))
        assert int.from_bytes(packed.tobytes(), "little") == naive
        assert np.array_equal(unpack_words(packed, count, bits), words)

    @pytest.mark.parametrize(
        ("data", "count", "bits"), [(b"\0\0", 1, 8), (b"\0", 2, 8), (b"\x40", 2, 3), (b"", 1, 1)]
    )
    def test_bytes_that_pack_nothing_are_refused(self, data: bytes, count: int, bits: int) -> None:
        with pytest.raises(CorruptError, match="words"):
            unpack_words(np.frombuffer(data, np.uint8), count, bits)

    @pytest.mark.parametrize("bits", [0, 57])
    def test_words_of_other_widths_are_refused(self, bits: int) -> None:
        with pytest.raises(ValueError, match="bits"):
            pack_words(np.zeros(1, np.uint64), bits)


@given(sizes=st.lists(st.integers(0, 50), max_size=6), bits=st.integers(1, 56))
def test_a_vector_masked_piece_by_piece_is_the_vector_masked_at_once(sizes: list[int], bits: int) -> None:
    keys = [(bytes([number]) * 32, 1 - 2 * (number % 2)) for number in range(3)]
    whole = Masks(keys, bits).add_to(np.zeros(sum(sizes), np.uint64))
    masks = Masks(keys, bits)
    pieces = [masks.add_to(np.zeros(size, np.uint64)) for size in sizes]
    assert np.array_equal(whole, np.concatenate([whole[:0], *pieces]))

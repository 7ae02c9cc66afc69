from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.packing import CountReader, MarkReader, write_counts, write_marks
from fedgrpc.errors import CodecError, CorruptError
from tests.codec.strategies import float_arrays

STEPS = (0.02, 0.3, 0.8, 1.5, 3.0, 8.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def laplace(size: int, seed: int = 0) -> Array:
    return rng(seed).laplace(size=size).astype(np.float32)


def round_trip(encoding: Entropy, array: Array, seed: int = 0) -> Array:
    return encoding.decode(encoding.encode(array, rng(seed)), spec_of("x", array))


@settings(deadline=None)
@given(
    array=float_arrays(("float32", "float64")),
    c=st.sampled_from(STEPS),
    rounding=st.sampled_from(("stochastic", "nearest")),
)
def test_the_error_is_below_one_step_of_c_times_the_rms(array: Array, c: float, rounding: str) -> None:
    decoded = round_trip(Entropy(c, rounding=rounding), array)
    if not array.size:
        return
    values = array.astype(np.float64)
    step = c * np.sqrt((values**2).mean()) * (0.5 if rounding == "nearest" else 1)
    assert np.abs(decoded - values).max() <= step * (1 + 1e-5) + np.abs(values).max() * 1e-6 + 2.0**-100


@pytest.mark.parametrize("c", STEPS)
def test_the_symbols_are_the_ones_that_the_formula_gives(c: float) -> None:
    array = laplace(50_001)
    encoding = Entropy(c, rounding="nearest")
    data = encoding.encode(array, rng())
    step = np.float32(np.sqrt((array.astype(np.float64) ** 2).mean()) * c)
    wanted = np.rint(array * (np.float32(1) / step)).astype(np.int64)
    np.testing.assert_array_equal(encoding.symbols(data, spec_of("x", array)), wanted)
    np.testing.assert_allclose(encoding.decode(data, spec_of("x", array)), wanted * step, rtol=1e-6)


def test_every_base_is_used_by_some_step_and_all_round_trip() -> None:
    bases = {int(Entropy(c).encode(laplace(20_000), rng())[4]) for c in STEPS}
    assert bases == {255, 15, 5, 1}


@pytest.mark.parametrize("c", [0.8, 3.0, 8.0])
def test_it_is_unbiased_including_rare_values_far_beyond_the_digits(c: float) -> None:
    array = laplace(3000)
    array[::500] *= 40
    total = np.zeros(array.size)
    repeats = 400
    for seed in range(repeats):
        total += round_trip(Entropy(c), array, seed)
    step = c * np.sqrt((array.astype(np.float64) ** 2).mean())
    assert np.abs(total / repeats - array).max() < step * 0.5 / np.sqrt(repeats) * 5
    assert abs((total / repeats - array).mean()) < step * 0.5 / np.sqrt(repeats * array.size) * 5


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.9])
def test_a_wanted_distortion_is_met_within_a_tenth(rounding: str, wanted: float) -> None:
    array = laplace(200_000, 4)
    decoded = round_trip(Entropy(distortion=wanted, rounding=rounding), array)
    measured = ((decoded - array) ** 2).sum() / (array**2).sum()
    assert abs(measured / wanted - 1) < 0.1


def test_a_tensor_of_zeros_takes_only_a_header() -> None:
    array = np.zeros(1000, np.float32)
    assert Entropy().encode(array, rng()).nbytes == 8
    np.testing.assert_array_equal(round_trip(Entropy(), array), array)


@pytest.mark.parametrize(
    ("c", "rounding", "contractive"), [(1.9, "stochastic", True), (3, "stochastic", False), (3, "nearest", True)]
)
def test_whether_error_feedback_is_safe_follows_the_step(c: float, rounding: str, contractive: bool) -> None:
    encoding = Entropy(c, rounding=rounding)
    assert encoding.contractive == contractive
    constant = np.full(4096, -1.0, np.float32)  # the worst case of c - 1
    if contractive:
        assert ((round_trip(encoding, constant) - constant) ** 2).sum() <= (constant**2).sum()


@given(st.lists(st.integers(0, 5000), unique=True, max_size=60), st.integers(0))
def test_marks_give_back_positions_and_flags(positions: list[int], seed: int) -> None:
    array = np.array(sorted(positions), np.int64)
    flags = rng(seed).random(array.size) < 0.5
    np.testing.assert_array_equal(MarkReader(write_marks(array)).take(array.size), array)
    read, read_flags = MarkReader(write_marks(array, flags), flagged=True).among(5001)
    np.testing.assert_array_equal(read, array)
    np.testing.assert_array_equal(read_flags, flags)
    np.testing.assert_array_equal(CountReader(write_counts(array)).take(array.size), array)


@given(st.lists(st.integers(0, 300), max_size=60), st.lists(st.integers(0, 90), max_size=60))
def test_marks_come_in_parts_of_any_size(gaps: list[int], parts: list[int]) -> None:
    positions = np.cumsum(np.array([gap + 1 for gap in gaps], np.int64)) - 1
    reader, start, found = MarkReader(write_marks(positions)), 0, []
    for part in parts:
        found += [start + place for place in reader.among(part)[0].tolist()]
        start += part
    assert found == [place for place in positions.tolist() if place < start]


def test_marks_past_the_end_unfinished_or_meaningless_are_corrupt() -> None:
    def read(stream: list[int]) -> None:
        reader = MarkReader(np.array(stream, np.uint8), flagged=True)
        reader.among(128)
        reader.finish()

    for stream in ([255, 3], [5, 255], [254]):
        with pytest.raises(CorruptError):
            read(stream)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32 - 1), st.sampled_from(STEPS))
def test_a_garbled_tensor_gives_a_tensor_or_a_codec_error(seed: int, c: float) -> None:
    source = rng(seed)
    array = laplace(int(source.integers(1, 3000)), seed)
    data = bytearray(Entropy(c).encode(array, source))
    for at in source.integers(0, len(data), 3):
        data[at] = int(source.integers(0, 256))
    try:
        decoded = Entropy(c).decode(memoryview(data), spec_of("x", array))
    except CodecError:
        return
    assert decoded.shape == array.shape

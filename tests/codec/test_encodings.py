from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.encoding import ENCODING_NAMES, Encoding, parse_encoding
from fedgrpc.codec.layout import Array, TensorSpec, spec_of
from fedgrpc.codec.uniform import Uniform
from fedgrpc.codec.values import PIECE
from fedgrpc.errors import CodecError, CorruptError, EncodeError, LayoutError, UsageError
from tests.codec.strategies import float_arrays, other_arrays

ALL = [parse_encoding(name) for name in ENCODING_NAMES]
LOSSY = [encoding for encoding in ALL if not encoding.lossless]
UNIFORM = [
    Uniform(bits, block, rounding)
    for bits in (8, 6, 4, 3, 2)
    for block in (8, 64, 256)
    for rounding in ("stochastic", "nearest")
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def round_trip(encoding: Encoding, array: Array, seed: int = 0) -> Array:
    spec = spec_of("x", array)
    data = memoryview(encoding.encode(array, rng(seed)))
    least, most = encoding.size_bounds(spec)
    assert least <= data.nbytes <= most
    decoded = encoding.decode(data, spec)
    assert decoded.dtype == array.dtype
    assert decoded.shape == array.shape
    return decoded


@given(array=st.one_of(float_arrays(), other_arrays()))
def test_raw_gives_back_every_dtype_bit_for_bit(array: Array) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.nan_to_num(array)
    decoded = round_trip(parse_encoding("raw"), array)
    assert decoded.tobytes() == np.ascontiguousarray(array).tobytes()


@given(array=float_arrays(("float64", "float32")), dtype=st.sampled_from(("float16", "bfloat16")))
def test_a_cast_is_numpys_own_rounding_to_nearest_even(array: Array, dtype: str) -> None:
    decoded = round_trip(parse_encoding(dtype), array)
    wanted = array.astype(TensorSpec("x", dtype, ()).numpy_dtype).astype(array.dtype)
    np.testing.assert_array_equal(decoded, wanted)


@settings(deadline=None)
@given(array=float_arrays(), encoding=st.sampled_from(UNIFORM))
def test_the_error_of_uniform_quantization_is_below_one_step_of_its_block(array: Array, encoding: Uniform) -> None:
    decoded = round_trip(encoding, array).astype(np.float64).reshape(-1)
    values = np.ascontiguousarray(array).astype(np.float64).reshape(-1)
    own_rounding = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(array.dtype.name, 2.0**-20)
    for start in range(0, values.size, encoding.block):
        block = slice(start, start + encoding.block)
        largest = np.abs(values[block]).max()
        step = largest / encoding.levels / (2 if encoding.rounding == "nearest" else 1)
        allowed = step * (1 + 1e-5) + largest * own_rounding + 2.0**-24
        assert np.abs(decoded[block] - values[block]).max() <= allowed


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("size", [PIECE * 3 + 777, PIECE * 9])
def test_fast_uniform_decoding_equals_the_naive_reading_of_its_bits(bits: int, size: int) -> None:
    encoding = Uniform(bits, 64)
    array = rng(1).standard_normal(size).astype(np.float32)
    data = bytes(encoding.encode(array, rng(2)))
    scales = np.frombuffer(data, "<f4", -(-size // 64))
    stream = np.unpackbits(np.frombuffer(data[scales.nbytes :], np.uint8), bitorder="little")[: size * bits]
    codes = stream.reshape(size, bits).astype(np.int64) @ (1 << np.arange(bits))
    codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    naive = codes.astype(np.float32) * np.repeat(scales, 64)[:size]
    np.testing.assert_array_equal(encoding.decode(memoryview(data), spec_of("x", array)), naive)


@pytest.mark.parametrize("encoding", [Uniform(8), Uniform(4), Uniform(2)], ids=str)
def test_stochastic_rounding_is_unbiased_even_where_random_numbers_are_reused(encoding: Uniform) -> None:
    array = rng(3).standard_normal(200_000).astype(np.float32)
    repeats = 64
    total = np.zeros(array.size)
    for seed in range(repeats):
        total += round_trip(encoding, array, seed)
    step = np.abs(array[: array.size // 256 * 256].reshape(-1, 256)).max(axis=1) / encoding.levels
    error = (total / repeats - array)[: step.size * 256].reshape(-1, 256) / step[:, None]
    fraction = (array[: step.size * 256].reshape(-1, 256) / step[:, None]) % 1
    deviation = np.sqrt(fraction * (1 - fraction) / repeats)
    standard = error[deviation > 0.01] / deviation[deviation > 0.01]
    # Per element the mean of `repeats` draws is within its standard error: as a whole, z-scores of variance 1.
    assert abs(standard.mean()) < 5 / np.sqrt(200_000 / 8)
    assert abs(standard.var() - 1) < 0.05
    assert np.abs(standard).max() < 8


@settings(deadline=None)
@given(array=float_arrays(), encoding=st.sampled_from(ALL))
def test_encoding_never_changes_its_input_and_repeats_under_a_seed(array: Array, encoding: Encoding) -> None:
    before = array.copy()
    array.flags.writeable = False
    first, second = (bytes(encoding.encode(array, rng(5))) for _ in range(2))
    assert first == second
    assert before.tobytes() == array.tobytes()


@pytest.mark.parametrize("encoding", ALL, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(
    encoding: Encoding, bad: float, dtype: str
) -> None:
    for at in (0, 100, PIECE + 5, 2 * PIECE + 99):
        array = np.ones(2 * PIECE + 100, TensorSpec("x", dtype, ()).numpy_dtype)
        array[at] = bad
        with pytest.raises(EncodeError):
            encoding.encode(array, rng())


@pytest.mark.parametrize("encoding", [*UNIFORM, Uniform(8, 65536)], ids=str)
@pytest.mark.parametrize("size", [1, 300, PIECE, 5 * PIECE + 77])
def test_what_quantizing_tells_of_the_values_to_come_is_what_is_decoded(encoding: Uniform, size: int) -> None:
    array = rng(size).standard_t(3, size=size).astype(np.float32)
    array[size // 3 : size // 2] = 0
    array[::97] = -0.0
    arrived = np.full(size, np.nan, np.float32)

    def arrives(start: int, values: Array, decoded: Array) -> None:
        np.testing.assert_array_equal(values, array[start : start + values.size])
        arrived[start : start + decoded.size] = decoded
        decoded[:] = np.nan

    data = encoding.encode_parts(lambda start, stop: array[start:stop], size, rng(), arrives)
    assert bytes(data) == bytes(encoding.encode(array, rng()))
    # Bit for bit, the signs of zeros among them: a base of the next difference is made of these.
    assert arrived.tobytes() == encoding.decode(data, spec_of("x", array)).tobytes()


def test_nan_with_a_sign_is_refused_too() -> None:
    array = np.ones(1000, np.float32)
    array.view(np.uint32)[700] = 0xFFC00000
    with pytest.raises(EncodeError):
        Uniform().encode(array, rng())


def test_values_out_of_the_target_range_are_refused_rather_than_saturated() -> None:
    with pytest.raises(EncodeError):
        parse_encoding("float16").encode(np.full(100, 70000, np.float32), rng())
    with pytest.raises(EncodeError):
        parse_encoding("int8").encode(np.full(100, 1e200), rng())


def test_subnormal_blocks_become_zero_and_the_largest_allowed_value_survives() -> None:
    array = np.full(512, 1e-44, np.float32)
    array[256:] = 2.0**127
    decoded = round_trip(parse_encoding("int8:rounding=nearest"), array)
    assert (decoded[:256] == 0).all()
    np.testing.assert_allclose(decoded[256:], 2.0**127, rtol=1e-5)


@settings(deadline=None)
@given(data=st.binary(max_size=400), encoding=st.sampled_from(ALL), size=st.integers(0, 500), seed=st.integers(0))
def test_garbage_bytes_give_a_tensor_or_a_codec_error_and_nothing_else(
    data: bytes, encoding: Encoding, size: int, seed: int
) -> None:
    spec = TensorSpec("x", "float32", (size,))
    least, most = encoding.size_bounds(spec)
    wanted = least + seed % (most - least + 1)
    padded = (data * (wanted // max(1, len(data)) + 1))[:wanted]
    for candidate in (data, padded):
        try:
            decoded = encoding.decode(memoryview(candidate), spec)
        except CodecError:
            continue
        assert decoded.shape == (size,)


def test_a_wrong_number_of_bytes_is_a_layout_error_and_a_negative_scale_a_corrupt_one() -> None:
    encoding = parse_encoding("int8")
    array = np.ones(300, np.float32)
    data = bytearray(encoding.encode(array, rng()))
    with pytest.raises(LayoutError, match="encoded bytes"):
        encoding.decode(memoryview(data[:-1]), spec_of("x", array))
    data[3] |= 0x80
    with pytest.raises(CorruptError, match="scale"):
        encoding.decode(memoryview(data), spec_of("x", array))


def test_a_lossy_encoding_of_integers_is_refused_by_its_size_bounds() -> None:
    for encoding in LOSSY:
        with pytest.raises(LayoutError):
            encoding.size_bounds(TensorSpec("x", "int64", (100,)))


@pytest.mark.parametrize("encoding", [*ALL, *UNIFORM], ids=str)
def test_the_text_of_an_encoding_reads_back_as_the_same_encoding(encoding: Encoding) -> None:
    assert parse_encoding(str(encoding)) == encoding


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("float32", "raw"),
        ("uniform8", "int8"),
        ("uniform4:block=64,rounding=nearest", "int4:block=64,rounding=nearest"),
    ],
)
def test_other_names_are_understood(text: str, wanted: str) -> None:
    assert str(parse_encoding(text)) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "int7", "int8:block", "int8:block=x", "int8:block=100", "int8:rounding=up", "raw:level=3", "x" * 9999],
)
def test_bad_text_is_a_usage_error_of_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_encoding(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300

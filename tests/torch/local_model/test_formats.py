"""Rounding is that of IEEE 754 and OCP: bit for bit that of torch, of ml_dtypes, and of gfloat for any width."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import Domain, FormatInfo, RoundMode, round_ndarray
from torch import Tensor

from fedgrpc.errors import UsageError
from fedgrpc.torch.local_model.formats import (
    BFLOAT16,
    FLOAT8_E4M3,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT24,
    FLOAT32,
    FLOAT64,
    NAMED,
    FixedFormat,
    FloatFormat,
    parse_format,
)

TORCH = {
    FLOAT16: torch.float16,
    BFLOAT16: torch.bfloat16,
    FLOAT8_E4M3FN: torch.float8_e4m3fn,
    FLOAT8_E5M2: torch.float8_e5m2,
}
ML_DTYPES = {
    FLOAT16: np.float16,
    BFLOAT16: ml_dtypes.bfloat16,
    FLOAT8_E4M3: ml_dtypes.float8_e4m3,
    FLOAT8_E4M3FN: ml_dtypes.float8_e4m3fn,
    FLOAT8_E5M2: ml_dtypes.float8_e5m2,
    FloatFormat(3, 5): ml_dtypes.float8_e3m4,
}
# Some releases of torch saturate in E4M3, others give NaN; OCP allows both.
SATURATES = bool(torch.tensor(1e9).to(torch.float8_e4m3fn).float() == FLOAT8_E4M3FN.largest)
ALL_FLOAT16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def random_patterns(count: int, seed: int = 0) -> Tensor:
    """float32 values of random bits: every exponent, subnormals, infinities and NaN among them."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Equal values, signs of zero too; NaN only where NaN is due."""
    assert got.dtype == wanted.dtype
    assert torch.equal(got.isnan(), wanted.isnan())
    view = torch.int32 if got.dtype is torch.float32 else torch.int64
    differ = (got.view(view) != wanted.view(view)) & ~got.isnan()
    assert not differ.any(), (got[differ][:5], wanted[differ][:5])


@pytest.mark.parametrize("format_", TORCH, ids=str)
@pytest.mark.parametrize("carrier", [torch.float32, torch.float64])
def test_every_float16_value_rounds_as_torch_rounds_it(format_: FloatFormat, carrier: torch.dtype) -> None:
    values = ALL_FLOAT16.to(carrier)
    saturate = SATURATES and not format_.infinities
    assert_same(format_.round(values, saturate=saturate), values.to(TORCH[format_]).to(carrier))


@pytest.mark.parametrize("format_", TORCH, ids=str)
def test_two_million_random_patterns_round_as_torch_rounds_them(format_: FloatFormat) -> None:
    values = random_patterns(2_000_000)
    saturate = SATURATES and not format_.infinities
    assert_same(format_.round(values, saturate=saturate), values.to(TORCH[format_]).float())


@pytest.mark.parametrize("format_", ML_DTYPES, ids=str)
def test_two_million_random_patterns_round_as_ml_dtypes_rounds_them(format_: FloatFormat) -> None:
    values = random_patterns(2_000_000, seed=1)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.numpy().astype(ML_DTYPES[format_]).astype(np.float32)
    assert_same(format_.round(values), torch.from_numpy(wanted))


@pytest.mark.parametrize("format_", ML_DTYPES, ids=str)
def test_values_around_every_tie_round_as_ml_dtypes_rounds_them(format_: FloatFormat) -> None:
    numbers = format_.round(ALL_FLOAT16.float())
    numbers = torch.tensor(sorted(set(numbers[numbers.isfinite()].tolist())))
    ties = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    values = torch.cat([numbers, ties, ties.nextafter(infinity), ties.nextafter(-infinity)])
    with np.errstate(over="ignore"):
        wanted = values.numpy().astype(ML_DTYPES[format_]).astype(np.float32)
    assert_same(format_.round(values), torch.from_numpy(wanted))


def oracle(format_: FloatFormat) -> FormatInfo:
    """The same format in gfloat, which knows exponent and significand widths as we do."""
    return FormatInfo(
        name=str(format_),
        k=format_.bits,
        precision=format_.significand_bits,
        bias=2 ** (format_.exponent_bits - 1) - 1,
        has_nz=True,
        domain=Domain.Extended if format_.infinities else Domain.Finite,
        num_high_nans=2 ** (format_.significand_bits - 1) - 1 if format_.infinities else 1,
        has_subnormals=True,
        is_signed=True,
        is_twos_complement=False,
    )


ODD = [*NAMED.values(), FloatFormat(2, 2), FloatFormat(6, 9), FloatFormat(3, 21), FloatFormat(11, 30)]


@pytest.mark.parametrize("format_", [each for each in ODD if each != FLOAT64], ids=str)
@pytest.mark.parametrize("saturate", [False, True])
def test_any_format_rounds_as_gfloat_rounds(format_: FloatFormat, saturate: bool) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal(20_000) * np.exp2(rng.uniform(-160, 160, 20_000))
    near = rng.standard_normal(20_000) * np.exp2(rng.uniform(-12, 12, 20_000))
    values = np.concatenate([values, near, [0.0, -0.0, np.inf, -np.inf, np.nan]])
    with np.errstate(all="ignore"):
        wanted = round_ndarray(oracle(format_), values, RoundMode.TiesToEven, saturate)
    assert_same(format_.round(torch.from_numpy(values), saturate=saturate), torch.from_numpy(wanted))


@pytest.mark.parametrize("format_", ODD, ids=str)
def test_limits_are_numbers_of_the_format_and_what_is_beyond_them_is_not(format_: FloatFormat) -> None:
    edges = torch.tensor([format_.largest, format_.smallest], dtype=torch.float64)
    assert torch.equal(format_.round(edges), edges)
    if format_ != FLOAT64:
        beyond = format_.round(edges * torch.tensor([1.5, 0.49], dtype=torch.float64))
        assert not beyond[0].isfinite()
        assert beyond[1] == 0
        assert format_.round(edges * 1.5, saturate=True)[0] == format_.largest


def test_seventy_thousand_is_infinite_in_float16_and_saturates_when_asked_to() -> None:
    values = torch.tensor([65519.0, 65520.0, 70000.0, -70000.0])
    inf = float("inf")
    assert FLOAT16.round(values).tolist() == [65504.0, inf, inf, -inf]
    assert FLOAT16.round(values, saturate=True).tolist() == [65504.0, 65504.0, 65504.0, -65504.0]


@pytest.mark.parametrize("format_", [FLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2, BFLOAT16, FLOAT24], ids=str)
@pytest.mark.parametrize("exponent", [-2, None])
def test_stochastic_rounding_hits_both_neighbours_with_the_right_mean(
    format_: FloatFormat, exponent: int | None
) -> None:
    start = format_.smallest * 2 if exponent is None else 2.0**exponent
    step = format_.smallest if exponent is None else start * 2 * format_.unit_roundoff
    value = start + 0.3 * step
    generator = torch.Generator().manual_seed(5)
    values = torch.full((40_000,), value, dtype=torch.float64)
    rounded = format_.round(values, "stochastic", generator=generator)
    assert set(rounded.tolist()) == {start, start + step}
    share_up = float((rounded > start).double().mean())
    assert abs(share_up - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5


@pytest.mark.parametrize("format_", ODD, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounding_twice_changes_nothing(format_: FloatFormat, rounding: str) -> None:
    values = random_patterns(100_000, seed=2).double()
    once = format_.round(values, rounding)
    assert_same(format_.round(once, rounding), once)


def test_float32_rounds_float64_as_torch_does_and_leaves_float32_alone() -> None:
    values = random_patterns(1_000_000).double() * 1.2345678901234567
    assert_same(FLOAT32.round(values), values.float().double())
    patterns = random_patterns(1_000_000)
    assert_same(FLOAT32.round(patterns), patterns)


def test_a_carrier_that_cannot_hold_the_format_is_refused() -> None:
    with pytest.raises(TypeError, match="use float64"):
        FloatFormat(11, 30).round(torch.zeros(1))
    with pytest.raises(TypeError, match="float32 and float64"):
        FLOAT8_E5M2.round(torch.zeros(1, dtype=torch.float16))


def test_fixed_point_rounds_to_multiples_and_saturates() -> None:
    fixed = FixedFormat(8, 4)
    values = torch.tensor([0.03125, 0.09375, 100.0, -100.0, -0.5])
    assert fixed.round(values).tolist() == [0.0, 0.125, 7.9375, -8.0, -0.5]


def test_fixed_point_stochastic_rounding_is_right_in_the_mean() -> None:
    values = torch.full((40_000,), -0.3)
    rounded = FixedFormat(8, 0).round(values, "stochastic", generator=torch.Generator().manual_seed(1))
    assert abs(float(rounded.mean()) + 0.3) < 0.01


@pytest.mark.parametrize("text", [*NAMED, "e5s12", "fixed16.8", "fixed8.-2"])
def test_text_form_comes_back(text: str) -> None:
    assert str(parse_format(text)) == text


@pytest.mark.parametrize("text", ["float12", "e5", "e1s4", "fixed8", "fixed99.2", "e5s-3", ""])
def test_a_format_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_format(text)

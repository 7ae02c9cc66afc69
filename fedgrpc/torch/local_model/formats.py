"""Number formats of any exponent and significand width, and rounding to them.

The rule: values stay in an ordinary torch dtype, their carrier. After rounding, every value is a number of the
format.

IEEE 754-2019 for formats with infinities; OCP 8-bit Floating Point Specification for those without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrpc.errors import UsageError

NEAREST, STOCHASTIC = "nearest", "stochastic"
ROUNDINGS = (NEAREST, STOCHASTIC)


@dataclass(frozen=True)
class FloatFormat:
    """Binary floating point of 1 + `exponent_bits` + (`significand_bits` - 1) bits.

    `significand_bits` counts the leading bit that is not stored, as IEEE 754's precision p does. With
    `infinities`, the largest exponent is reserved for infinities and NaN. Without, only its all-ones significand
    is NaN, and overflow gives NaN (OCP's E4M3). Every format has subnormals.
    """

    exponent_bits: int
    significand_bits: int
    infinities: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.exponent_bits <= 11:
            raise UsageError(f"a format has 2 to 11 exponent bits, not {self.exponent_bits}")
        if not 2 <= self.significand_bits <= 53:
            raise UsageError(f"a format has 2 to 53 significand bits, not {self.significand_bits}")

    @property
    def bits(self) -> int:
        """Bits that one number takes."""
        return self.exponent_bits + self.significand_bits

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number, as in 1.xxx * 2^exponent."""
        bias = (1 << self.exponent_bits - 1) - 1
        return bias if self.infinities else bias + 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << self.exponent_bits - 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        steps = 2.0 - 2.0 ** (1 - self.significand_bits) * (1 if self.infinities else 2)
        return math.ldexp(steps, self.max_exponent)

    @property
    def smallest(self) -> float:
        """The smallest positive number; it is subnormal."""
        return math.ldexp(1.0, self.min_exponent - self.significand_bits + 1)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a normal number to nearest."""
        return math.ldexp(1.0, -self.significand_bits)

    @property
    def carrier(self) -> torch.dtype:
        """The dtype whose rounded operations equal those of the format: float32 if wide enough, else float64.

        Rounding twice is harmless for +, -, *, / and square roots if the wider format has at least 2p + 2
        significand bits (Figueroa 1995), and float32 has 24.
        """
        return torch.float32 if 2 * self.significand_bits + 2 <= 24 and self.exponent_bits <= 8 else torch.float64

    @property
    def native(self) -> torch.dtype | None:
        """The torch dtype that computes in exactly this format, if there is one."""
        return _NATIVE.get(self)

    def round(
        self,
        values: Tensor,
        rounding: str = NEAREST,
        saturate: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Round `values` (float32 or float64) to this format, as a new tensor of their dtype.

        `nearest` rounds ties to even. `stochastic` chooses either neighbour with the probability that makes the
        expectation exact. Overflow gives infinity (NaN without infinities) or, with `saturate`, the largest
        number. Infinite values count as overflow.
        """
        if rounding == NEAREST and not saturate and values.dtype is torch.float32 and self in _CASTS:
            return values.to(_CASTS[self]).to(torch.float32)
        bits, total_bits, carrier_bits = _CARRIERS[_carried(values, self)]
        spare = carrier_bits - self.significand_bits
        uniform = None if rounding == NEAREST else _uniform(values, generator)
        rounded = _round_normal(values, bits, total_bits, spare, uniform)
        if self.exponent_bits == 8 and self.infinities and values.dtype is torch.float32 and not saturate:
            # The format has float32's exponents: the same bits are dropped from subnormals, and a carry past the
            # largest number makes an infinity.
            return torch.where(values.isnan(), values, rounded)
        tiny = values.abs() < math.ldexp(1.0, self.min_exponent)
        rounded = torch.where(tiny, self._round_tiny(values, carrier_bits, uniform), rounded)
        return self._overflowed(values, rounded, saturate)

    def _round_tiny(self, values: Tensor, carrier_bits: int, uniform: Tensor | None) -> Tensor:
        """Round values below the smallest normal number to multiples of `smallest`."""
        quantum_exponent = self.min_exponent - self.significand_bits + 1
        if uniform is None:
            # At `shift` the carrier's own spacing is the quantum, so its addition rounds to it, ties to even.
            shift = math.ldexp(1.0, quantum_exponent + carrier_bits - 1)
            return torch.copysign((values.abs() + shift) - shift, values)
        # Scaled in two steps, because the quantum itself may be subnormal in the carrier.
        half = quantum_exponent // 2
        up, rest = math.ldexp(1.0, -half), math.ldexp(1.0, half - quantum_exponent)
        steps = torch.floor(values.abs() * up * rest + uniform)
        return torch.copysign(steps / rest / up, values)

    def _overflowed(self, values: Tensor, rounded: Tensor, saturate: bool) -> Tensor:
        over = (rounded.abs() > self.largest) | values.isinf()
        if saturate:
            beyond = torch.full_like(values, self.largest)
        else:
            beyond = torch.full_like(values, math.inf if self.infinities else math.nan)
        rounded = torch.where(over, torch.copysign(beyond, values), rounded)
        return torch.where(values.isnan(), values, rounded)

    def __str__(self) -> str:
        return _NAMES.get(self, f"e{self.exponent_bits}s{self.significand_bits}")


@dataclass(frozen=True)
class FixedFormat:
    """Two's complement integers of `bits` bits, in units of 2^-`fraction_bits`; overflow saturates."""

    bits: int
    fraction_bits: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24:
            raise UsageError(f"a fixed-point format has 2 to 24 bits, not {self.bits}")
        if not -64 <= self.fraction_bits <= 64:
            raise UsageError(f"a fixed-point format has -64 to 64 fraction bits, not {self.fraction_bits}")

    @property
    def largest(self) -> float:
        """The largest number."""
        return math.ldexp(2.0 ** (self.bits - 1) - 1, -self.fraction_bits)

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def carrier(self) -> torch.dtype:
        """The dtype that holds products of two numbers exactly, so that they are rounded once."""
        return torch.float32 if self.bits <= 12 else torch.float64

    @property
    def native(self) -> torch.dtype | None:
        """No native type: torch trains in no integer one."""
        return None

    def round(
        self,
        values: Tensor,
        rounding: str = NEAREST,
        saturate: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Round as `FloatFormat.round` does. NaN stays NaN, and overflow always saturates."""
        scaled = values * math.ldexp(1.0, self.fraction_bits)
        if rounding == NEAREST:
            steps = scaled.round()
        else:
            steps = torch.floor(scaled + _uniform(values, generator))
        top = 2.0 ** (self.bits - 1)
        return steps.clamp(-top, top - 1) * self.smallest

    def __str__(self) -> str:
        return f"fixed{self.bits}.{self.fraction_bits}"


NumberFormat = FloatFormat | FixedFormat

# Carrier: its integer view, all its bits, and its significand bits.
_CARRIERS = {torch.float32: (torch.int32, 32, 24), torch.float64: (torch.int64, 64, 53)}


def _uniform(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a random number from 0 to below 1 for each value."""
    return torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)


def _carried(values: Tensor, format_: FloatFormat) -> torch.dtype:
    """Return the dtype of `values`. Raises TypeError unless it holds every number of the format."""
    dtype = values.dtype
    if dtype not in _CARRIERS:
        raise TypeError(f"rounding works on float32 and float64, not {dtype}")
    fits = format_.significand_bits <= 24 and format_.max_exponent <= 127
    if dtype is torch.float32 and not fits:
        raise TypeError(f"float32 does not hold every number of {format_}; use float64")
    return dtype


def _round_normal(values: Tensor, bits: torch.dtype, total: int, spare: int, uniform: Tensor | None) -> Tensor:
    """Round by dropping the last `spare` bits of the significand.

    Sign, exponent and significand are one integer, so a carry out of the significand correctly increments the
    exponent.
    """
    if not spare:
        return values.clone()
    pattern = values.view(bits)
    if uniform is None:
        pattern = pattern + ((1 << (spare - 1)) - 1) + ((pattern >> spare) & 1)
    else:
        pattern = pattern + (uniform * 2.0**spare).to(bits)
    return (pattern & -(1 << spare)).view(values.dtype)


FLOAT64 = FloatFormat(11, 53)
FLOAT32 = FloatFormat(8, 24)
FLOAT24 = FloatFormat(7, 17)
FLOAT16 = FloatFormat(5, 11)
BFLOAT16 = FloatFormat(8, 8)
FLOAT8_E4M3 = FloatFormat(4, 4)
FLOAT8_E4M3FN = FloatFormat(4, 4, infinities=False)
FLOAT8_E5M2 = FloatFormat(5, 3)

NAMED: dict[str, FloatFormat] = {
    "float64": FLOAT64,
    "float32": FLOAT32,
    "float24": FLOAT24,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "float8_e4m3": FLOAT8_E4M3,
    "float8_e4m3fn": FLOAT8_E4M3FN,
    "float8_e5m2": FLOAT8_E5M2,
}
# torch's own casts from float32 that round as this module does, in a quarter of the time.
_CASTS = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16, FLOAT8_E5M2: torch.float8_e5m2}
_NAMES = {format_: name for name, format_ in NAMED.items()}
_NATIVE = {
    FLOAT64: torch.float64,
    FLOAT32: torch.float32,
    FLOAT16: torch.float16,
    BFLOAT16: torch.bfloat16,
}


def parse_format(text: str) -> NumberFormat:
    """Parse a named format, `e5s11` (exponent and significand bits) or `fixed8.4` (all bits, fraction bits).

    Raises:
        UsageError: it is none of these.
    """
    if text in NAMED:
        return NAMED[text]
    for prefix, separator, make in (("fixed", ".", FixedFormat), ("e", "s", FloatFormat)):
        left, found, right = text.removeprefix(prefix).partition(separator)
        if text.startswith(prefix) and found and left.isdecimal() and right.removeprefix("-").isdecimal():
            return make(int(left), int(right))
    raise UsageError(f"no number format {text!r}: choose {', '.join(NAMED)}, e5s11, fixed8.4 or the like")

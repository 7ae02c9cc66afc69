"""Blockwise uniform quantization to n bits: symmetric, one float32 scale per block, bit-packed.

    s = max|x| / L,  L = 2^(n-1) - 1,  q = floor(x / s + u),  u ~ U[0, 1)  (stochastic)  or  1/2 (nearest)

    bytes: the scales of all blocks (float32), then all codes q in n-bit two's complement, packed

Stochastic rounding is unbiased, E[s q] = x, as in QSGD (Alistarh et al., arXiv 1610.02132). The error of
an element is below s, or s/2 to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.packing import pack, packed_size, unpack
from fedgrpc.codec.rounding import Dither
from fedgrpc.codec.values import (
    PIECE,
    Arrives,
    Content,
    Fill,
    Part,
    as_float32,
    filled,
    flat,
    pieces,
    require_float,
    require_size,
)
from fedgrpc.errors import CorruptError, EncodeError, UsageError

BITS = (8, 6, 4, 3, 2)
ROUNDINGS = ("stochastic", "nearest")
# The scale is this much above max|x| / L, so that float32 rounding never carries a code past L.
_HEADROOM = 1 + 2.0**-20
_SMALLEST_SCALE = np.float32(2.0**-126)
_LARGEST_VALUE = np.float32(2.0**127)
_PIECES_AT_ONCE = 2


@dataclass(frozen=True)
class Uniform(TextForm):
    """Symmetric n-bit quantization (arXiv 1610.02132) in blocks of `block` elements.

    A block whose scale would be below 2^-126 becomes zero; values above 2^127 are refused.
    """

    name: ClassVar[str] = "uniform"
    lossless: ClassVar[bool] = False
    bits: int = 8
    block: int = 256
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"uniform quantization to {self.bits} bits; allowed: {BITS}")
        if not 8 <= self.block <= 65536 or self.block & (self.block - 1):
            raise UsageError(f"block={self.block}; allowed: a power of two from 8 to 65536")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding={self.rounding}; allowed: {', '.join(ROUNDINGS)}")

    @property
    def name_and_field(self) -> tuple[str, str]:
        return f"int{self.bits}", "bits"

    @property
    def levels(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def contractive(self) -> bool:
        """False for two bits: there stochastic rounding adds more noise than a Gaussian block has signal."""
        return self.rounding == "nearest" or self.bits > 2

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        return self.encode_parts(lambda start, stop: as_float32(values[start:stop]), values.size, rng)

    def encode_parts(
        self, part: Part, size: int, rng: np.random.Generator, arrives: Arrives | None = None
    ) -> memoryview:
        """Encode `size` elements that `part` gives as float32, a cache-sized piece at a time.

        `arrives` gets each piece as it will be decoded, which costs one multiplication here.
        """
        scale_bytes = 4 * self._blocks(size)
        out = np.empty(scale_bytes + packed_size(size, self.bits), np.uint8)
        scales, packed = out[:scale_bytes].view("<f4"), out[scale_bytes:]
        dither = Dither(rng, size, self._piece) if self.rounding == "stochastic" else None
        scratch = np.empty(min(size, _PIECES_AT_ONCE * self._piece), np.float32)
        for piece in pieces(size, _PIECES_AT_ONCE * self._piece):
            values = part(piece.start, piece.stop)
            codes = scratch[: values.size]
            scale = scales[piece.start // self.block :][: self._blocks(values.size)]
            scale[:] = self._scales(self._largest(values, codes))
            # A block of zeros, or of values too small for a scale, has the scale 0 and no inverse.
            inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
            self._multiply(values, inverse, codes)
            self._round(codes, dither, piece.start)
            self._pack(codes, packed[piece.start * self.bits // 8 :])
            if arrives is not None:
                self._multiply(codes, scale, codes)
                arrives(piece.start, values, codes)
        return out.data

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        require_size(data, self.size_bounds(spec)[0], spec)
        fill = self.fill_from(lambda start, size: data[start : start + size], spec)
        return filled(fill, spec, self._piece)

    def fill_from(self, content: Content, spec: TensorSpec) -> Fill:
        """Return a function that decodes pieces as float32. Raises CorruptError for impossible scales."""
        scales = self._read_scales(content, spec)
        scale_bytes = scales.nbytes

        @np.errstate(over="ignore")
        def fill(out: Array, first: int) -> None:
            data = content(scale_bytes + first * self.bits // 8, packed_size(out.size, self.bits))
            codes = self._signed(unpack(np.frombuffer(data, np.uint8), out.size, self.bits))
            self._multiply(codes, scales[first // self.block :], out)

        return fill

    @np.errstate(over="ignore")
    def bounds_from(self, content: Content, spec: TensorSpec) -> Array:
        """Return a bound on the values of each block, float32; infinite if too large. Raises CorruptError."""
        return self._read_scales(content, spec) * np.float32(1 << (self.bits - 1))

    def _read_scales(self, content: Content, spec: TensorSpec) -> Array:
        scales = np.frombuffer(content(0, 4 * self._blocks(spec.size)), "<f4").astype(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise CorruptError(f"tensor {spec.name!r} has a block scale that is negative or not finite")
        return scales

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        exact = 4 * self._blocks(spec.size) + packed_size(spec.size, self.bits)
        return exact, exact

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """Return the codes, flat, for the order-0 entropy."""
        packed = np.frombuffer(data, np.uint8, offset=4 * self._blocks(spec.size))
        return unpack(packed, spec.size, self.bits)

    @property
    def _piece(self) -> int:
        return max(PIECE, self.block)

    def _blocks(self, size: int) -> int:
        return -(-size // self.block)

    def _largest(self, values: Array, scratch: Array) -> Array:
        """Return max|x| of each block; NaN or infinity where a block holds one."""
        whole = values.size // self.block * self.block
        # Non-negative floats are ordered as their bits are, and the maximum of integers takes half as long. NaN
        # is above all of them.
        bits = np.abs(values, out=scratch).view("<u4")
        largest = np.empty(self._blocks(values.size), "<u4")
        np.maximum.reduce(bits[:whole].reshape(-1, self.block), axis=1, out=largest[: whole // self.block])
        if whole < values.size:
            largest[-1] = bits[whole:].max()
        return largest.view("<f4")

    def _multiply(self, values: Array, factors: Array, out: Array) -> None:
        """Multiply each block by its factor; `values` are float32, or codes."""
        full = values.size // self.block
        whole = full * self.block
        rows = values[:whole].reshape(full, self.block)
        np.multiply(rows, factors[:full, None], out=out[:whole].reshape(full, self.block))
        if whole < values.size:
            np.multiply(values[whole:], factors[full], out=out[whole:])

    def _round(self, scaled: Array, dither: Dither | None, first: int) -> None:
        """Round in place, to codes as floats. Adding 0 turns -0 into 0."""
        if dither is None:
            np.add(np.rint(scaled, out=scaled), np.float32(0), out=scaled)
            return
        for piece in pieces(scaled.size, self._piece):
            part = scaled[piece]
            np.add(part, dither.at(first + piece.start, part.size), out=part)
        np.floor(scaled, out=scaled)

    def _pack(self, codes: Array, out: Array) -> None:
        if self.bits == 8:
            np.copyto(out[: codes.size].view(np.int8), codes, casting="unsafe")
            return
        chunk = pack(codes.astype(np.int8).view(np.uint8) & np.uint8(2**self.bits - 1), self.bits)
        out[: chunk.size] = chunk

    def _scales(self, largest: Array) -> Array:
        if not (largest <= _LARGEST_VALUE).all():
            raise EncodeError("a tensor holds NaN, infinity or a value above 2^127; it cannot be quantized")
        scale = largest * np.float32(_HEADROOM / self.levels)
        scale[scale < _SMALLEST_SCALE] = 0
        return np.asarray(scale)

    def _signed(self, codes: Array) -> Array:
        if self.bits == 8:
            return codes.view(np.int8)
        # Shift the sign bit of the code to the top, and back arithmetically.
        unused = 8 - self.bits
        return (codes << np.uint8(unused)).view(np.int8) >> np.int8(unused)

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

from fedgrpc.codec.bitpack import pack, packed_size, unpack
from fedgrpc.codec.dither import Dither
from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import format_options
from fedgrpc.codec.values import (
    PIECE,
    Content,
    Fill,
    as_float32,
    finished,
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


@dataclass(frozen=True)
class Uniform:
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
            raise UsageError(f"uniform quantization to {self.bits} bits; allowed are {BITS}")
        if not 8 <= self.block <= 65536 or self.block & (self.block - 1):
            raise UsageError(f"block={self.block}; allowed is a power of two from 8 to 65536")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding={self.rounding}; allowed are {', '.join(ROUNDINGS)}")

    def __str__(self) -> str:
        return format_options(f"int{self.bits}", self, "bits")

    @property
    def levels(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def contractive(self) -> bool:
        """With two bits, stochastic rounding adds more noise than a Gaussian block has signal."""
        return self.rounding == "nearest" or self.bits > 2

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        scale_bytes = 4 * self._blocks(values.size)
        out = np.empty(scale_bytes + packed_size(values.size, self.bits), np.uint8)
        scales, packed = out[:scale_bytes].view("<f4"), out[scale_bytes:]
        step = self._piece
        dither = Dither(rng, values.size, step) if self.rounding == "stochastic" else None
        for piece in pieces(values.size, step):
            first_block = piece.start // self.block
            uniform = dither.at(piece.start, piece.stop - piece.start) if dither else None
            codes = self._quantize(as_float32(values[piece]), scales[first_block:], uniform)
            at = piece.start * self.bits // 8
            chunk = pack(codes, self.bits)
            packed[at : at + chunk.size] = chunk
        return out.data

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        require_size(data, self.size_bounds(spec)[0], spec)
        fill = self.fill_from(lambda start, size: data[start : start + size], spec)
        out = np.empty(spec.size, np.float32)
        for piece in pieces(spec.size, self._piece):
            fill(out[piece], piece.start)
        return finished(out, spec)

    def fill_from(self, content: Content, spec: TensorSpec) -> Fill:
        """What decodes elements as float32, a piece at a time. Raises CorruptError for scales that cannot be."""
        scale_bytes = 4 * self._blocks(spec.size)
        scales = np.frombuffer(content(0, scale_bytes), "<f4").astype(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise CorruptError(f"tensor {spec.name!r} has a block scale that is negative or not finite")

        @np.errstate(over="ignore")
        def fill(out: Array, first: int) -> None:
            data = content(scale_bytes + first * self.bits // 8, packed_size(out.size, self.bits))
            codes = self._signed(unpack(np.frombuffer(data, np.uint8), out.size, self.bits))
            self._dequantize(codes, scales[first // self.block :], out)

        return fill

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        exact = 4 * self._blocks(spec.size) + packed_size(spec.size, self.bits)
        return exact, exact

    def symbols(self, data: memoryview, spec: TensorSpec) -> Array:
        """The codes, flat: what the order-0 entropy is taken of."""
        packed = np.frombuffer(data, np.uint8, offset=4 * self._blocks(spec.size))
        return unpack(packed, spec.size, self.bits)

    @property
    def _piece(self) -> int:
        return max(PIECE, self.block)

    def _blocks(self, size: int) -> int:
        return -(-size // self.block)

    def _quantize(self, values: Array, scales: Array, uniform: Array | None) -> Array:
        """Write the scales of a piece's blocks; return its codes as uint8 below 2**bits."""
        size, blocks = values.size, self._blocks(values.size)
        if size % self.block:
            values = np.concatenate([values, np.zeros(-size % self.block, np.float32)])
        rows = values.reshape(blocks, self.block)
        scratch = np.abs(rows)
        scale = self._scales(scratch.max(axis=1))
        scales[:blocks] = scale
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        np.multiply(rows, inverse[:, None], out=scratch)
        scaled = scratch.reshape(-1)[:size]
        if uniform is None:
            np.rint(scaled, out=scaled)
        else:
            np.floor(np.add(scaled, uniform, out=scaled), out=scaled)
        codes = scaled.astype(np.int8).view(np.uint8)
        return codes if self.bits == 8 else codes & np.uint8(2**self.bits - 1)

    def _scales(self, largest: Array) -> Array:
        if not (largest <= _LARGEST_VALUE).all():
            raise EncodeError("a tensor holds NaN, infinity or a value above 2^127; it cannot be quantized")
        scale = largest * np.float32(_HEADROOM / self.levels)
        scale[scale < _SMALLEST_SCALE] = 0
        return np.asarray(scale)

    def _signed(self, codes: Array) -> Array:
        if self.bits == 8:
            return codes.view(np.int8)
        unused = 8 - self.bits
        return (codes << np.uint8(unused)).view(np.int8) >> np.int8(unused)

    def _dequantize(self, codes: Array, scales: Array, out: Array) -> None:
        full = codes.size // self.block
        whole = full * self.block
        rows = codes[:whole].reshape(full, self.block)
        np.multiply(rows, scales[:full, None], out=out[:whole].reshape(full, self.block))
        if whole < codes.size:
            np.multiply(codes[whole:], scales[full], out=out[whole:])

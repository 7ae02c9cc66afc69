"""Few different values: each of them once, and for each element the number of its own.

Weight sharing as in Deep Compression (arXiv 1510.00149). Nothing is lost. A tensor of more than 256 different
values, or of so few elements that a codebook does not pay, is written as it is.

    bytes: count uint16
           count > 0: that many values, increasing by their bits, then codes packed as those of `Uniform`
           count = 0: the elements

A code has the fewest bits of 1, 2, 3, 4, 6 and 8 that hold count - 1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.packing import pack, packed_size, unpack
from fedgrpc.codec.values import flat, pieces, refuse_non_finite, require_float, require_size
from fedgrpc.errors import CorruptError, LayoutError

_COUNT = struct.Struct("<H")
_BITS = (1, 2, 3, 4, 6, 8)
_MOST_VALUES = 256


@dataclass(frozen=True)
class Codebook(TextForm):
    """Exact, whatever the values are."""

    name: ClassVar[str] = "codebook"
    lossless: ClassVar[bool] = True
    contractive: ClassVar[bool] = True

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        refuse_non_finite(values)
        words = values.view(f"<u{values.itemsize}")
        different = np.unique(words)
        if 0 < different.size <= _MOST_VALUES:
            bits = code_bits(different.size)
            if different.nbytes + packed_size(values.size, bits) < values.nbytes:
                codes = np.empty(values.size, np.uint8)
                for piece in pieces(values.size):
                    codes[piece] = np.searchsorted(different, words[piece])
                return memoryview(_COUNT.pack(different.size) + different.tobytes() + pack(codes, bits).tobytes())
        return memoryview(_COUNT.pack(0) + values.tobytes())

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        if data.nbytes < _COUNT.size:
            raise LayoutError(f"tensor {spec.name!r} has {data.nbytes} encoded bytes, its header {_COUNT.size}")
        (count,) = _COUNT.unpack_from(data)
        dtype = spec.numpy_dtype
        if not count:
            require_size(data, _COUNT.size + spec.nbytes, spec)
            return np.frombuffer(data, dtype, spec.size, _COUNT.size).reshape(spec.shape)
        if count > _MOST_VALUES:
            raise CorruptError(f"tensor {spec.name!r} has a codebook of {count} values, more than {_MOST_VALUES}")
        bits, start = code_bits(count), _COUNT.size + count * dtype.itemsize
        require_size(data, start + packed_size(spec.size, bits), spec)
        values = np.frombuffer(data, dtype, count, _COUNT.size)
        packed = np.frombuffer(data, np.uint8, offset=start)
        out = np.empty(spec.size, dtype)
        for piece in pieces(spec.size):
            part = packed[piece.start * bits // 8 : packed_size(piece.stop, bits)]
            codes = unpack(part, piece.stop - piece.start, bits)
            if codes.max(initial=0) >= count:
                raise CorruptError(f"tensor {spec.name!r} has a code beyond its {count} values")
            out[piece] = values[codes]
        return out.reshape(spec.shape)

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        least = spec.numpy_dtype.itemsize + packed_size(spec.size, 1) if spec.size else 0
        return _COUNT.size + min(least, spec.nbytes), _COUNT.size + spec.nbytes


def code_bits(count: int) -> int:
    """Return the bits of a code of a codebook of `count` values."""
    return next(bits for bits in _BITS if count <= 1 << bits)

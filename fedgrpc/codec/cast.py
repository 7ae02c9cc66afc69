"""Floats rounded to float16 or bfloat16, to nearest even, two bytes each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.shuffle import shuffle, unshuffle
from fedgrpc.codec.values import flat, pieces, refuse_non_finite, require_float, require_size

_TARGETS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Cast(TextForm):
    """Relative error at most 2^-11 (float16, values of 6.1e-5 to 65504) or 2^-8 (bfloat16, normal values)."""

    name: ClassVar[str] = "cast"
    lossless: ClassVar[bool] = False
    contractive: ClassVar[bool] = True
    dtype: str = "float16"
    shuffle: bool = False

    @property
    def name_and_field(self) -> tuple[str, str]:
        return self.dtype, "dtype"

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`; a value that overflows float16 is refused, not saturated."""
        values = flat(array)
        out = np.empty(values.size, _TARGETS[self.dtype])
        with np.errstate(over="ignore", invalid="ignore"):
            for piece in pieces(values.size):
                out[piece] = values[piece]
        refuse_non_finite(out)
        return shuffle(out).data if self.shuffle else out.view(np.uint8).data

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`."""
        require_size(data, 2 * spec.size, spec)
        content, dtype = np.frombuffer(data, np.uint8), _TARGETS[self.dtype]
        values = unshuffle(content, dtype) if self.shuffle else content.view(dtype)
        return values.astype(spec.numpy_dtype).reshape(spec.shape)

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        require_float(spec, self)
        return 2 * spec.size, 2 * spec.size

"""An encoding (`--upload-encoding fixed16`): fixed point with 16 bits. Aggregator and workers both need it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.codec.options import TextForm
from fedgrpc.errors import EncodeError, LayoutError


@dataclass(frozen=True)
class Fixed16(TextForm):
    """Values from -`range` to `range` as int16, little-endian; an error of at most range / 65534."""

    name: ClassVar[str] = "fixed16"
    lossless: ClassVar[bool] = False
    contractive: ClassVar[bool] = False
    range: float = 4.0

    def encode(self, array, rng):
        scaled = np.asarray(array, np.float64).ravel() * (32767 / self.range)
        if not np.all(np.abs(scaled) <= 32767.5):
            raise EncodeError(f"values are not all from -{self.range:g} to {self.range:g}")
        return np.rint(scaled).astype("<i2").tobytes()

    def decode(self, data, spec):
        if len(data) != 2 * spec.size:
            raise LayoutError(f"{spec.name}: {len(data)} bytes, not {2 * spec.size}")
        values = np.frombuffer(data, "<i2") * (self.range / 32767)
        return values.astype(spec.numpy_dtype).reshape(spec.shape)

    def size_bounds(self, spec):
        return 2 * spec.size, 2 * spec.size

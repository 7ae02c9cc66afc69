"""Elements unchanged, little-endian, in C order. Integers, bool and tiny tensors always travel so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import TextForm
from fedgrpc.codec.shuffle import shuffle, unshuffle
from fedgrpc.codec.values import Content, Fill, flat, refuse_non_finite, require_size
from fedgrpc.errors import CorruptError


@dataclass(frozen=True)
class Raw(TextForm):
    """Lossless; without `shuffle` the bytes are a view of a contiguous array's own memory, not a copy."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True
    contractive: ClassVar[bool] = True
    shuffle: bool = False

    def encode(self, array: Array, rng: np.random.Generator) -> memoryview:
        """See `Encoding.encode`."""
        values = flat(array)
        refuse_non_finite(values)
        return self._bytes_of(values)

    def encode_any(self, array: Array) -> memoryview:
        """Encode values that may be infinite or NaN, as the entries of a mask are."""
        return self._bytes_of(flat(array))

    def _bytes_of(self, values: Array) -> memoryview:
        if values.dtype == np.bool_:
            values = as_bool(values)
        return shuffle(values).data if self.shuffle else values.view(np.uint8).data.toreadonly()

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """See `Encoding.decode`; without `shuffle` a read-only view of `data` where alignment allows it."""
        require_size(data, spec.nbytes, spec)
        content = np.frombuffer(data, np.uint8)
        if spec.dtype == "bool" and content.max(initial=0) > 1:
            raise CorruptError(f"tensor {spec.name!r} holds a bool that is neither 0 nor 1")
        if self.shuffle:
            return unshuffle(content, spec.numpy_dtype).reshape(spec.shape)
        values = content.view(spec.numpy_dtype).reshape(spec.shape)
        return values if values.flags.aligned else values.copy()

    def fill_from(self, content: Content, spec: TensorSpec) -> Fill:
        """Return a function that reads elements from the content. Not for shuffled ones."""

        def fill(out: Array, first: int) -> None:
            data = content(first * out.itemsize, out.nbytes)
            out.view(np.uint8)[:] = np.frombuffer(data, np.uint8)

        return fill

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """See `Encoding.size_bounds`."""
        return spec.nbytes, spec.nbytes


def as_bool(values: Array) -> Array:
    """Return bools whose bytes are 0 and 1. Other bytes seen as bool are converted: readers refuse them."""
    bytes_of = values.view(np.uint8)
    return values if bytes_of.max(initial=0) <= 1 else bytes_of != 0

"""What tensors a payload holds: names, dtypes and shapes, without their values.

Nothing here is trusted: a layout may come from the wire, so every property is plain arithmetic on
Python integers, and `TensorSpec.validate` decides before any memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from fedgrpc.errors import EncodeError, LayoutError

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
# Asking a dtype for its name costs more than the rest of a small tensor's spec.
_NAMES = {each: name for name, dtype in _DTYPES.items() for each in (dtype, dtype.newbyteorder(">"))}
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
MAX_NAME_CHARS = 1024


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's name, dtype (one of `DTYPE_NAMES`) and shape; 0-d and empty tensors are legal."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian numpy dtype; raises LayoutError for an unknown dtype name."""
        try:
            return _DTYPES[self.dtype]
        except KeyError:
            raise LayoutError(f"tensor {self.name!r} has the unknown dtype {self.dtype!r}") from None

    @cached_property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.size * self.numpy_dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether a lossy encoding may be used at all: integers and bool always travel as they are."""
        return self.dtype in _FLOATS

    def validate(self, max_dims: int) -> None:
        """Raise LayoutError unless name, dtype and shape can be a real tensor's."""
        if not 0 < len(self.name) <= MAX_NAME_CHARS:
            raise LayoutError(f"a tensor name has {len(self.name)} characters, allowed are 1 to {MAX_NAME_CHARS}")
        if len(self.shape) > max_dims:
            raise LayoutError(f"tensor {self.name!r} has {len(self.shape)} dimensions, allowed are {max_dims}")
        if any(extent < 0 for extent in self.shape):
            raise LayoutError(f"tensor {self.name!r} has a negative extent in its shape {self.shape}")
        # numpy multiplies the non-zero extents even of an empty tensor, and refuses what overflows.
        if math.prod(extent for extent in self.shape if extent) * self.numpy_dtype.itemsize >= 2**62:
            raise LayoutError(f"tensor {self.name!r} has the impossible shape {self.shape}")


DTYPE_NAMES: tuple[str, ...] = tuple(sorted(_DTYPES))
Layout = tuple[TensorSpec, ...]


def spec_of(name: str, array: Array) -> TensorSpec:
    """Name, dtype and shape of an array; raises EncodeError for a dtype that payloads do not carry."""
    dtype = _NAMES.get(array.dtype)
    if dtype is None:
        raise EncodeError(f"tensor {name!r} has dtype {array.dtype}, allowed are {', '.join(DTYPE_NAMES)}")
    return TensorSpec(name, dtype, array.shape)


def layout_of(tensors: Mapping[str, Array]) -> Layout:
    """Layout of a state dict, in its order; raises EncodeError for a dtype that payloads do not carry."""
    return tuple(spec_of(name, array) for name, array in tensors.items())

"""Layouts: names, dtypes, shapes and roles of the tensors of a model or payload, without their values.

A layout may come from the wire and is not trusted. So every property is plain arithmetic on Python integers, and
`TensorSpec.validate` decides before any memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
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
MAX_TIED_NAMES = 64


class TensorRole(StrEnum):
    """The part that a tensor plays in a model. Only float parameters travel as differences, and may lose bits.

    The others have a domain: a variance below 0 or half a mask means nothing. They travel as values, without loss.
    """

    PARAMETER = "parameter"  # trained
    STATISTIC = "statistic"  # measured by training, such as a running variance: averaged
    COUNTER = "counter"  # counted by training: averaged and rounded
    CONSTANT = "constant"  # a mask or a table: stays as the initial model has it


_ROLES_BY_NAME = {
    "running_mean": TensorRole.STATISTIC,
    "running_var": TensorRole.STATISTIC,
    "num_batches_tracked": TensorRole.COUNTER,
}


def role_by_name(name: str) -> TensorRole:
    """Return the role of a tensor that none was given for: PyTorch's batch statistics are known by their names."""
    return _ROLES_BY_NAME.get(name.rpartition(".")[2], TensorRole.PARAMETER)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's name, dtype (one of `DTYPE_NAMES`), shape and role; 0-d and empty tensors are legal.

    `tied_names`: further names of this very tensor in the model's code.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: TensorRole = TensorRole.PARAMETER
    tied_names: tuple[str, ...] = ()

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
        """True if its elements are floating-point numbers."""
        return self.dtype in _FLOATS

    @property
    def is_trained(self) -> bool:
        """True if it is a float parameter: travels as a difference, may lose bits, and optimizers step on it."""
        return self.role is TensorRole.PARAMETER and self.dtype in _FLOATS

    @property
    def is_variance(self) -> bool:
        """True if it is a variance by its name: no value of it is below zero."""
        return self.role is TensorRole.STATISTIC and self.name.rpartition(".")[2] == "running_var"

    def validate(self, max_dims: int) -> None:
        """Raise LayoutError unless name, dtype and shape can be a real tensor's."""
        if not 0 < len(self.name) <= MAX_NAME_CHARS:
            raise LayoutError(f"a tensor name has {len(self.name)} characters, allowed: 1 to {MAX_NAME_CHARS}")
        longest = max(map(len, self.tied_names), default=1)
        if len(self.tied_names) > MAX_TIED_NAMES or longest > MAX_NAME_CHARS or "" in self.tied_names:
            raise LayoutError(f"tensor {self.name!r} is tied to too many names, or to one that is too long")
        if len(self.shape) > max_dims:
            raise LayoutError(f"tensor {self.name!r} has {len(self.shape)} dimensions, allowed: {max_dims}")
        if any(extent < 0 for extent in self.shape):
            raise LayoutError(f"tensor {self.name!r} has a negative extent in its shape {self.shape}")
        # numpy multiplies the non-zero extents even of an empty tensor, and refuses what overflows.
        if math.prod(extent for extent in self.shape if extent) * self.numpy_dtype.itemsize >= 2**62:
            raise LayoutError(f"tensor {self.name!r} has the impossible shape {self.shape}")


DTYPE_NAMES: tuple[str, ...] = tuple(sorted(_DTYPES))
Layout = tuple[TensorSpec, ...]


def spec_of(name: str, array: Array, known: TensorSpec | None = None) -> TensorSpec:
    """Return the spec of an array. Role and tied names are those of `known`, or else follow from the name.

    Raises EncodeError for a dtype that payloads do not carry.
    """
    dtype = _NAMES.get(array.dtype)
    if dtype is None:
        raise EncodeError(f"tensor {name!r} has dtype {array.dtype}, allowed: {', '.join(DTYPE_NAMES)}")
    if known is None:
        return TensorSpec(name, dtype, array.shape, role_by_name(name))
    return TensorSpec(name, dtype, array.shape, known.role, known.tied_names)


def layout_of(tensors: Mapping[str, Array], known: Layout = ()) -> Layout:
    """Return the layout of a state dict, in its order; roles and tied names come from `known` (see `spec_of`)."""
    by_name = {spec.name: spec for spec in known}
    return tuple(spec_of(name, array, by_name.get(name)) for name, array in tensors.items())


def told_layout(tensors: Mapping[str, Array], known: Layout = ()) -> Layout:
    """Return the layout that tensors which are read on access tell themselves, else as `layout_of`."""
    told: Layout | None = getattr(tensors, "layout", None)
    return layout_of(tensors, known) if told is None else told


def check_unique(layout: Layout) -> None:
    """Raise LayoutError if two tensors have a name in common."""
    names = [name for spec in layout for name in (spec.name, *spec.tied_names)]
    if len(set(names)) != len(names):
        raise LayoutError("a layout names a tensor twice")

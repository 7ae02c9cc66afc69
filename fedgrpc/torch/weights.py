"""Conversion between a module's state_dict and numpy weights.

The rule: every persistent tensor crosses under its own state_dict name, in its own dtype. Tied tensors (one
storage under several names) cross once, under the name that sorts first, as in `safetensors`. Weights that arrive
under another of their names are accepted. The prefix that `torch.compile` adds does not cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedgrpc.codec.layout import Layout, TensorRole, spec_of
from fedgrpc.errors import EncodeError, LayoutError, UsageError
from fedgrpc.trainer import TrainResult, Weights

T = TypeVar("T")

_COMPILED = "_orig_mod"

# numpy has no types of its own for these dtypes, so their bits cross.
_BY_BITS: dict[torch.dtype, tuple[torch.dtype, np.dtype]] = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
}
_BACK = {numpy_dtype: (torch_dtype, bits) for torch_dtype, (bits, numpy_dtype) in _BY_BITS.items()}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own tensors (not copies) by name; tied ones by the name that sorts first.

    Raises:
        UsageError: the module keeps state that is no tensor, or is not initialized yet.
    """
    return {min(names): tensor.detach() for names, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """List each tensor of the state once, with all its names, in state_dict order. Raises UsageError."""
    return [(names, tensors[0]) for names, tensors in shared_memory(module)]


def shared_memory(module: nn.Module) -> list[tuple[list[str], list[Tensor]]]:
    """List the state by memory, in state_dict order: all names of a tensor, and every object that is it.

    Raises UsageError.
    """
    found: dict[object, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            raise UsageError(f"the model's state {name!r} is no initialized tensor, so it cannot be shared")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise UsageError(
                f"the model's {name!r} is no plain array of elements, which updates do not carry; keep it "
                "dense, or, if it is a buffer, register it with persistent=False"
            )
        names, tensors = found.setdefault(_place(name, tensor), ([], []))
        names.append(name.replace(f"{_COMPILED}.", ""))
        if not any(tensor is each for each in tensors):
            tensors.append(tensor)
    return list(found.values())


def _place(name: str, tensor: Tensor) -> object:
    """Return a key that tied tensors share."""
    if not tensor.numel():
        return name
    # Without memory, every address is 0, and only the storage object tells tensors apart.
    where = (tensor.untyped_storage()._cdata, tensor.storage_offset()) if tensor.is_meta else tensor.data_ptr()
    return where, tensor.shape, tensor.stride(), tensor.dtype


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`'s wrapper, or the module itself."""
    inner = getattr(module, _COMPILED, module)
    assert isinstance(inner, nn.Module)
    return inner


@dataclass(frozen=True)
class Names:
    """All names of a module's tensors, each with the name that its tensor crosses under."""

    own: Mapping[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> Names:
        """Collect the names. Raises UsageError as `named_tensors`."""
        return cls({name: min(names) for names, _ in _tensors(module) for name in names})

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """The further names of tied tensors."""
        found: dict[str, tuple[str, ...]] = {}
        for name, own in sorted(self.own.items()):
            if name != own:
                found[own] = (*found.get(own, ()), name)
        return found

    def to_own(self, given: Mapping[str, T]) -> Mapping[str, T]:
        """Rename entries under any name of a tensor to its own name; names of no tensor stay."""
        if all(self.own.get(name, name) == name for name in given):
            # Entries that are read on access stay unread.
            return given
        return {self.own.get(name, name): each for name, each in reversed(list(given.items()))}

    def to_given(self, result: TrainResult, given: Weights) -> TrainResult:
        """Rename the result to the names under which the weights were given."""
        own = {name: self.own[name] for name in given}

        def renamed(found: Mapping[str, T]) -> dict[str, T]:
            return {name: found[source] for name, source in own.items() if source in found}

        start = None if result.start is None else renamed(result.start)
        clustered = tuple(name for name, source in own.items() if source in result.clustered)
        masks = renamed(result.masks)
        return replace(result, weights=renamed(result.weights), start=start, masks=masks, clustered=clustered)


def prepare(module: nn.Module) -> None:
    """Make a new module ready for `weights_of` and `load_weights`. Raises as `check_tensors`."""
    own_memory(module)
    check_tensors(module)


def own_memory(module: nn.Module) -> None:
    """Give each buffer memory of its own, since elements of an expanded one share memory and cannot be loaded."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.layout is torch.strided and not buffer.is_nested and _overlaps(buffer):
                setattr(owner, name, buffer.clone(memory_format=torch.contiguous_format))


def check_tensors(module: nn.Module, with_values: bool = True) -> None:
    """Check that a run can share the module's tensors and, `with_values`, that it can start from these.

    Raises:
        UsageError: a tensor cannot be shared, and the message says how it can.
    """
    buffers = {name.replace(f"{_COMPILED}.", "") for name, _ in module.named_buffers(remove_duplicate=False)}
    for names, tensor in _tensors(module):
        if with_values and tensor.is_meta:
            raise UsageError(
                f"the model's {min(names)!r} is on the meta device and has no values; initialize it in model()"
            )
        _check(min(names), tensor, is_buffer=not buffers.isdisjoint(names))


def _check(name: str, tensor: Tensor, is_buffer: bool) -> None:
    cure = "; register it with persistent=False to keep it on the device" if is_buffer else ""
    try:
        spec_of(name, np.empty(0, numpy_dtype(tensor.dtype)))
    except (EncodeError, TypeError) as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(f"the model's {name!r} is {dtype}, which updates do not carry{cure}") from error
    if is_buffer:
        return
    if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
        raise UsageError(f"the model's parameter {name!r} has values that are not finite before any training")
    if _overlaps(tensor):
        raise UsageError(f"elements of the model's parameter {name!r} share memory; make it contiguous in model()")


def _overlaps(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the dtype in which tensors of a torch dtype cross. Raises TypeError where there is none."""
    return _to_numpy(torch.empty(0, dtype=dtype)).dtype


def module_layout(module: nn.Module) -> Layout:
    """Return the layout of the module's weights, with roles and tied names. The module needs no values."""
    roles, tied = tensor_roles(module), Names.of(module).tied
    found = []
    for name, tensor in named_tensors(module).items():
        # A view of one element has the shape, and no memory for it.
        spec = spec_of(name, np.broadcast_to(np.empty((), numpy_dtype(tensor.dtype)), tuple(tensor.shape)))
        found.append(replace(spec, role=roles.get(name, spec.role), tied_names=tied.get(name, ())))
    return tuple(found)


def tensor_roles(module: nn.Module) -> dict[str, TensorRole]:
    """Return the roles of all but trained parameters, by name.

    Float buffers are statistics, others counters, and parameters without gradient constants.
    """
    parameters = {id(parameter): parameter for parameter in module.parameters()}
    buffers = {id(b): b for b in module.buffers() if id(b) not in parameters}
    roles = {
        min(names): TensorRole.STATISTIC if tensor.is_floating_point() else TensorRole.COUNTER
        for names, tensor in _tensors(module)
        if id(tensor) in buffers
    }
    frozen = {
        min(names): TensorRole.CONSTANT
        for names, tensor in _tensors(module)
        if id(tensor) in parameters and not parameters[id(tensor)].requires_grad
    }
    return roles | frozen


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """Copy the module's tensors into numpy arrays."""
    return {name: _to_numpy(tensor) for name, tensor in named_tensors(module).items()}


def taken_weights(module: nn.Module) -> dict[str, np.ndarray]:
    """Return the module's tensors as numpy arrays, without a copy where they are on the CPU.

    For a module that is not used any more.
    """
    return {name: _as_numpy(tensor.to("cpu").contiguous()) for name, tensor in named_tensors(module).items()}


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy `weights` into the module, in place; on an error the module is as it was.

    Raises:
        LayoutError: names, shapes or dtypes are not those of the module.
    """
    own = named_tensors(module)
    check_names(own.keys(), weights.keys())
    incoming = {name: tensor_like(name, weights[name], tensor, tensor.shape) for name, tensor in own.items()}
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(incoming[name])


def check_names(own: Set[str], given: Set[str]) -> None:
    """Raise LayoutError unless the given names are the module's own."""
    if own != given:
        raise LayoutError(_difference(set(own - given), set(given - own)))


def tensor_like(name: str, array: np.ndarray, own: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `array` as a tensor. Raises LayoutError unless it has `shape`, and the dtype of `own`."""
    given = _to_torch(array)
    if given.shape != shape or given.dtype != own.dtype:
        theirs, ours = _describe(given.dtype, given.shape), _describe(own.dtype, shape)
        raise LayoutError(f"tensor {name!r} is {theirs} in the run and {ours} in this worker's model")
    return given


def fill_tensor(tensor: Tensor, name: str, array: np.ndarray) -> None:
    """Copy `array` into a new tensor of its own memory. Raises LayoutError unless it has its shape and dtype."""
    plain = tensor.device.type == "cpu" and tensor.dtype not in _BY_BITS and tensor.dtype is not torch.bool
    if plain and (held := tensor.numpy()).shape == array.shape and held.dtype == array.dtype:
        # Most of them: without a tensor of the array, and a copy of one that is read-only.
        np.copyto(held, array)
    else:
        tensor.copy_(tensor_like(name, array, tensor, tuple(tensor.shape)))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    # Copied, because a view in numpy would pin the module's storage, which some observers resize.
    return _as_numpy(tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))


def _as_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bool:
        # A bool tensor made from a view of bytes holds other bytes than 0 and 1, which torch reads as true.
        return np.asarray(tensor.view(torch.uint8).numpy() != 0)
    if tensor.dtype in _BY_BITS:
        bits, dtype = _BY_BITS[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar one-dimensional
    if array.dtype in _BACK:
        dtype, bits = _BACK[array.dtype]
        return torch.from_numpy(array.view(np.int16 if bits is torch.int16 else np.uint8).copy()).view(dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _difference(missing: set[str], unexpected: set[str]) -> str:
    parts = []
    if missing:
        parts.append(f"the run lacks {_some(missing)}")
    if unexpected:
        parts.append(f"this worker's model lacks {_some(unexpected)}")
    return "this worker's model is not the run's: " + "; ".join(parts)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

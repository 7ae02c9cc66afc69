"""Building of a task's module: first without any values, then with those of one task, tensor by tensor.

The rule: a device holds no more of the model than the sub-model that it works on. The user's constructor runs on
torch's meta device, where tensors have shapes and no memory. Only tensors of the sub-model get memory, when the
weights of a task are loaded. A module that cannot be built so is built whole once, and the log says why.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from fedgrpc.codec.layout import Layout
from fedgrpc.torch.early_exits import holding
from fedgrpc.torch.module_copies import ModuleCopies, with_tensors
from fedgrpc.torch.weights import (
    Names,
    check_tensors,
    fill_tensor,
    module_layout,
    named_tensors,
    own_memory,
    shared_memory,
    uncompiled,
)
from fedgrpc.trainer import Weights

log = structlog.get_logger()

Shape = tuple[int, ...]


class ModuleBuilder:
    """The module of a task without values, `module`, and what it tells of the model: `names` and `layout`.

    `build` runs the user's constructor and gives the same values at each call.
    """

    def __init__(self, build: Callable[[], nn.Module], device: torch.device) -> None:
        """Raises UsageError for a model that no run can share, and whatever the user's constructor raises."""
        self._build = build
        self._device = device
        module, why = _empty(build)
        if module is None:
            log.warning("the whole model is built on this device, for any width", reason=why)
            module = self.initial()
        else:
            check_tensors(module, with_values=False)
        self.names = Names.of(module)
        self.layout: Layout = module_layout(module)
        empty = self.is_empty(module)
        self.module = module if empty else module.to(device)
        # The module with values that is kept from task to task; None where each task builds its own.
        self.whole = None if empty else self.module

    @staticmethod
    def is_empty(module: nn.Module) -> bool:
        """Return whether the module has no values."""
        return any(tensor.is_meta for tensor in named_tensors(module).values())

    def initial(self) -> nn.Module:
        """Build the whole model with its initial values, on the CPU. Raises UsageError as `check_tensors`."""
        module = self._build()
        own_memory(module)
        check_tensors(module)
        return module

    def blank(self, shapes: Mapping[str, Shape] | None = None) -> nn.Module:
        """Build the module with zeros that take no memory, perhaps with narrower `shapes` or fewer blocks."""
        shapes = shapes or {spec.name: spec.shape for spec in self.layout}
        module = holding(uncompiled(self.module), shapes)
        made: dict[int, Tensor] = {}
        for names, tensors in shared_memory(module):
            memory = unwritten_zeros(shapes[min(names)], tensors[0].dtype)
            made |= {id(tensor): _as(tensor, memory) for tensor in tensors}
        return with_tensors(module, made)

    def filled(self, weights: Weights, shapes: Mapping[str, Shape]) -> nn.Module:
        """Build the module with these weights, whose `shapes` may be narrower than its own, of fewer blocks.

        Tensor by tensor, so that weights that are read on access are in memory once.

        Raises:
            LayoutError: a tensor has another shape or dtype.
        """
        module = holding(uncompiled(self.module), shapes)
        made: dict[int, Tensor] = {}
        for names, tensors in self._state if module is self.module else shared_memory(module):
            name, own = min(names), tensors[0]
            memory = torch.empty(
                shapes[name], dtype=own.dtype, device=self._device, memory_format=_memory_format(own)
            )
            fill_tensor(memory, name, weights[name])
            made |= {id(tensor): _as(tensor, memory) for tensor in tensors}
        # A module with values is copied as it is now, with what its last training has left in it.
        as_built = self.whole is None and module is self.module
        filled = self._copies.copy(made) if as_built else with_tensors(module, made)
        return filled if self._device.type == "cpu" else filled.to(self._device)

    @cached_property
    def _copies(self) -> ModuleCopies:
        return ModuleCopies(self.module)

    @cached_property
    def _state(self) -> list[tuple[list[str], list[Tensor]]]:
        return shared_memory(self.module)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def unwritten_zeros(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor of zeros whose memory is the system's one page of zeros until it is written.

    The meta device would need no address space either, but its operations import sympy and torch._dynamo: 70 MB.
    """
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def _as(tensor: Tensor, memory: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(memory, requires_grad=tensor.requires_grad)
    return memory


def _empty(build: Callable[[], nn.Module]) -> tuple[nn.Module | None, str]:
    """Build the module without values; None with the reason where that cannot be."""
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, IndexError) as error:
        # The constructor needs values, or it is wrong in itself: then it raises again when it runs with values.
        return None, f"its constructor needs values: {' '.join(str(error).split())[:200]}"
    if uncompiled(module) is not module:
        return None, "torch.compile would compile it again for every task"
    return (None, why) if (why := _lost_values(module)) else (module, "")


def _lost_values(module: nn.Module) -> str:
    """Say which values of the module do not come with the weights; "" for none."""
    state = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for path, part in module.named_modules():
        buffers = {name: buffer for name, buffer in part._buffers.items() if buffer is not None}
        for name, value in (*buffers.items(), *_attributes(part)):
            where = f"{path}.{name}".lstrip(".")
            if isinstance(value, Tensor) and value.is_meta and id(value) not in state:
                return f"{where!r} is no part of its state, so no run brings its values"
            if isinstance(value, nn.Module):
                return f"the function {where!r} refers to its modules"
    if partly := _partly_shared(module):
        return f"its tensors {partly[0]!r} and {partly[1]!r} share memory in part"
    return ""


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield tensors among the module's plain attributes, and what functions among them and hooks refer to."""
    for name, value in vars(part).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for each in (value, *values):
            yield from ((name, found) for found in _reached(each))


def _reached(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield value
    for cell in getattr(value, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue


def _partly_shared(module: nn.Module) -> tuple[str, str] | None:
    """Return two tensors that share memory without being one, such as a weight and its transpose."""
    seen: dict[int, str] = {}
    for names, tensors in shared_memory(module):
        name, place = min(names), tensors[0].untyped_storage()._cdata
        if tensors[0].numel() and seen.setdefault(place, name) != name:
            return seen[place], name
    return None

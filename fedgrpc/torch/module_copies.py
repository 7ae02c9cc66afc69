"""Copies of a module without values, in which tensors with values take the place of its own.

    ModuleCopies(module).copy({id(module.weight): nn.Parameter(...)})

The rule: a copy is what `copy.deepcopy` makes with these tensors in its memo. Most modules are copied by pickle,
which does the same in C, several times as fast.
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Mapping
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, Final

import structlog
from torch import Tensor, nn

log = structlog.get_logger()

# `copy.deepcopy` takes these as they are.
_ATOMIC: Final = (type, FunctionType, BuiltinFunctionType, CodeType, weakref.ref, property)


class ModuleCopies:
    """Copies of one module, which must not change meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._referred: list[Any] = []
        self._pickled: bytes | None = None
        out = io.BytesIO()
        try:
            _Pickler(out, self._referred).dump(module)
            self._pickled = out.getvalue()
        except (pickle.PicklingError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            log.debug("the module is copied slowly", reason=" ".join(str(error).split())[:200])

    @property
    def pickled(self) -> bool:
        """True if copies are made by pickle."""
        return self._pickled is not None

    def copy(self, tensors: Mapping[int, Tensor]) -> nn.Module:
        """Return a copy with other tensors in place of those with these ids, which are not copied."""
        if self._pickled is None:
            return with_tensors(self._module, tensors)
        # Only what `_Pickler` has written in this process.
        # Tied tensors stay tied, also those that are no part of the module's state.
        memo: dict[int, Any] = dict(tensors)
        referred = [copy.deepcopy(each, memo) if isinstance(each, Tensor) else each for each in self._referred]
        unpickler = pickle.Unpickler(io.BytesIO(self._pickled))
        unpickler.persistent_load = referred.__getitem__  # type: ignore[method-assign]
        module = unpickler.load()
        assert isinstance(module, nn.Module)
        return module


class _Pickler(pickle.Pickler):
    """Writes places in `referred` for tensors, and for what is not copied."""

    def __init__(self, out: io.BytesIO, referred: list[Any]) -> None:
        super().__init__(out, pickle.HIGHEST_PROTOCOL)
        self._referred = referred
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, (Tensor, *_ATOMIC)):
            if hasattr(type(obj), "__deepcopy__"):
                raise pickle.PicklingError(f"{type(obj).__name__} says how it is copied")
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self._referred)
            self._referred.append(obj)
        return self._places[id(obj)]


def with_tensors(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """Copy `module` with other tensors in place of those with these ids, which are not copied."""
    # `deepcopy` takes what its memo has in place of a copy, at every place in the module where the tensor occurs.
    # So tied tensors stay tied.
    memo: dict[int, object] = dict(tensors)
    return copy.deepcopy(module, memo)

"""Plugins: a class by a built-in name or as `package.module:Class`, made with options that a text gives.

    scaffold                     the built-in class of that name
    fedprox:mu=0.1               with an option
    trimmed-mean:0.2             the first option goes without its name
    my.module:Mine:rate=2,k=3    any importable class, with options

The rule: a plugin is a frozen dataclass whose fields are its options. A text that does not fit raises `UsageError`
in one line that names what would.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any, Final

from fedgrpc.errors import UsageError

MAX_CHARS: Final = 400


def make(kind: str, text: str, known: Mapping[str, type]) -> Any:
    """Return the plugin of `text`; `kind` names in messages what it is, and `known` has the built-in classes.

    Raises `UsageError`.
    """
    if not text.isprintable() or not 0 < len(text) <= MAX_CHARS:
        raise UsageError(f"the {kind} must be 1 to {MAX_CHARS} printable characters")
    name, _, rest = text.partition(":")
    if name in known:
        return _made(kind, name, known[name], rest)
    class_name, _, options = rest.partition(":")
    if not class_name.isidentifier():
        raise UsageError(f"no {kind} {name!r}; known: {', '.join(known)}, or a class as package.module:Class")
    return _made(kind, f"{name}:{class_name}", _imported(kind, name, class_name), options)


def _imported(kind: str, module: str, class_name: str) -> type:
    try:
        found = getattr(importlib.import_module(module), class_name, None)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise UsageError(f"{kind} {module}:{class_name}: {error}") from None
        raise UsageError(
            f"{kind} {module}:{class_name}: there is no module {error.name!r}; is its folder on PYTHONPATH?"
        ) from None
    # A module of others may raise anything, and a name of none (".x") raises what is no ImportError.
    except Exception as error:
        raise UsageError(f"{kind} {module}:{class_name}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise UsageError(f"{kind} {module}:{class_name}: the module has no dataclass of that name")
    return found


def _made(kind: str, name: str, plugin: type, options: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(plugin) if field.init}
    hints = typing.get_type_hints(plugin)
    given: dict[str, Any] = {}
    for number, option in enumerate(filter(None, options.split(","))):
        key, found, value = option.partition("=")
        if not found and not number and fields:
            key, found, value = next(iter(fields)), "=", option
        if not found or key not in fields:
            raise UsageError(f"{kind} {name} takes {_names(fields)}, not {option!r}")
        given[key] = _parsed(f"{kind} {name}: {key}", value, hints[key])
    missing = [key for key, field in fields.items() if _is_needed(field) and key not in given]
    if missing:
        raise UsageError(f"{kind} {name} needs {missing[0]}, as in {name}:{missing[0]}=VALUE")
    return plugin(**given)


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _names(fields: Mapping[str, Any]) -> str:
    return f"the options {', '.join(fields)}" if fields else "no options"


def _parsed(what: str, text: str, hint: Any) -> Any:
    """Convert to int, float or a tuple of texts (separated by `+`); anything else stays a text."""
    kinds = typing.get_args(hint) or (hint,)
    try:
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
    except ValueError:
        raise UsageError(f"{what} must be a number, not {text!r}") from None
    return tuple(text.split("+")) if typing.get_origin(hint) is tuple else text

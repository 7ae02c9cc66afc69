"""Plugins: a class by a built-in name, by an entry point, or as `package.module:Class`, with options in a text.

    scaffold                     the built-in class of that name
    fedprox:mu=0.1               with an option
    trimmed-mean:0.2             the first option goes without its name
    stripes:3                    a class that an installed package has under this name (`GROUPS`)
    my.module:Mine:rate=2,k=3    any importable class, with options

The rules: a plugin is a frozen dataclass whose fields are its options. A text that does not fit raises
`UsageError` in one line that names what would. What is imported was installed or named by an operator: texts of
callers from elsewhere are checked before they get here (`comes_with_fedgrpc`).
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from fedgrpc.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

MAX_CHARS: Final = 400
# Kinds of plugins, and the group in which packages name theirs as entry points.
GROUPS: Final[Mapping[str, str]] = {
    "algorithm": "fedgrpc.algorithms",
    "aggregation": "fedgrpc.aggregation_rules",
    "server optimizer": "fedgrpc.server_optimizers",
    "selection": "fedgrpc.selectors",
    "encoding": "fedgrpc.encodings",
    "partition": "fedgrpc.partitions",
    "tracker": "fedgrpc.trackers",
}


@dataclass(frozen=True)
class Installed:
    """A plugin of an installed package: its name, its class as `package.module:Class`, and the package."""

    kind: str
    name: str
    reference: str
    package: str
    version: str


def installed(kind: str) -> Iterator[Installed]:
    """Yield the plugins of a kind that packages have, by name. Nothing is imported."""
    for point in _entry_points(kind):
        package = point.dist
        about = (package.name, package.version) if package is not None else ("", "")
        yield Installed(kind, point.name, point.value, *about)


def make(kind: str, text: str, known: Mapping[str, type]) -> Any:
    """Return the plugin of `text`; `kind` is one of `GROUPS`, and `known` has the built-in classes.

    Raises `UsageError`.
    """
    name, found, options = class_of(kind, text, known)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise UsageError(f"{kind} {name}: the class is no dataclass, whose fields are its options")
    return _made(kind, name, found, options)


def class_of(kind: str, text: str, known: Mapping[str, Any]) -> tuple[str, Any, str]:
    """Return the name and the class that a text begins with, and the rest of it. Raises `UsageError`."""
    if not text.isprintable() or not 0 < len(text) <= MAX_CHARS:
        raise UsageError(f"the {kind} must be 1 to {MAX_CHARS} printable characters")
    name, _, rest = text.partition(":")
    if name in known:
        return name, known[name], rest
    if (point := _entry_point(kind, name)) is not None:
        module, _, class_name = point.value.partition(":")
        return name, _imported(kind, module, class_name), rest
    class_name, _, options = rest.partition(":")
    if not class_name.isidentifier():
        names = ", ".join([*known, *(each.name for each in installed(kind))])
        raise UsageError(f"no {kind} {name!r}; known: {names}, or a class as package.module:Class")
    return f"{name}:{class_name}", _imported(kind, name, class_name), options


def comes_with_fedgrpc(text: str, known: Mapping[str, Any]) -> bool:
    """Return whether a text names a built-in class: only such may come from another machine."""
    return text.partition(":")[0] in known


@cache
def _entry_points(kind: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a kind, by name. Reads the metadata of every installed package, once."""
    # Most processes need no plugin, and the import takes a while on a small device.
    from importlib.metadata import entry_points

    return tuple(sorted(entry_points(group=GROUPS[kind]), key=lambda point: point.name))


def _entry_point(kind: str, name: str) -> EntryPoint | None:
    """Return the entry point of a name. Raises `UsageError` where several packages have one."""
    found = [point for point in _entry_points(kind) if point.name == name]
    if len({point.value for point in found}) > 1:
        packages = " and ".join(sorted(point.dist.name for point in found if point.dist is not None))
        raise UsageError(f"{kind} {name}: {packages} both have it; write package.module:Class, or remove one")
    return found[0] if found else None


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
    if not isinstance(found, type):
        raise UsageError(f"{kind} {module}:{class_name}: the module has no class of that name")
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

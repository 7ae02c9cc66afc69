"""Tables of a TOML file as frozen dataclasses.

The rule: a table has the fields of its dataclass, with their types. An error names the place from the inside out:
`ratio of pruning of the plan of raspberry-pi-3`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fedgrpc.errors import UsageError

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def parse(text: str) -> dict[str, Any]:
    """Parse a document. Raises `UsageError`."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError also for numbers of thousands of digits, RecursionError for deep nesting.
        raise UsageError(f"not valid TOML: {' '.join(str(error).split())}") from error


def read(kind: type[T], table: Any, where: str, base: T | None = None) -> T:
    """Build a `kind` from a table, or from `base` with what the table names. Raises `UsageError`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} is a table, not {table!r}")
    for key in table:
        if key not in fields:
            raise UsageError(f"{where} has no {key!r}; it has {', '.join(fields)}")
    hints = get_type_hints(kind)
    values = {
        key: _value(value, hints[key], f"{key} of {where}", getattr(base, key, None))
        for key, value in table.items()
    }
    if base is not None:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where} has no {name!r}, which it needs")
    return kind(**values)


def read_all(kind: type[T], tables: Any, where: str, base: T | None = None) -> tuple[T, ...]:
    """Build a `kind` from each table of an array of tables. Raises `UsageError`."""
    if not isinstance(tables, list):
        raise UsageError(f"{where} are tables in double brackets, not {tables!r}")
    return tuple(read(kind, table, f"number {number} of {where}", base) for number, table in enumerate(tables, 1))


def _value(value: Any, hint: Any, where: str, base: Any = None) -> Any:
    if isinstance(hint, UnionType):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if dataclasses.is_dataclass(hint):
        return read(hint, value, where, base)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} is a list, not {value!r}")
        return tuple(_value(each, get_args(hint)[0], f"an item of {where}") for each in value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{where} is {' or '.join(map(repr, get_args(hint)))}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{where} is too large") from None
    if type(value) is not hint:
        raise UsageError(f"{where} is {_WORDS[hint]}, not {value!r}")
    return value

"""TOML files: those of settings, with one table per command, and any other that a setting names.

The rule: an error names the file. Settings become text, and are then parsed as flags are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedgrpc import toml
from fedgrpc.cli import COMMANDS
from fedgrpc.errors import UsageError

T = TypeVar("T")
Text = str | list[str]


def read_table(path: Path, table: str, keys: Mapping[str, bool]) -> dict[str, Text]:
    """Return the settings in `table` of the file, by key with underscores; none where it has no such table.

    `keys` are the known settings, and whether each may be given more than once, as a list or a table.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has an unknown table or key.
    """
    return read_file(path, lambda text: _settings(toml.parse(text), table, keys))


def read_file(path: Path, parse: Callable[[str], T]) -> T:
    """Return what `parse` makes of the text of a file. Raises `UsageError`, which names the file."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _settings(content: Mapping[str, Any], table: str, keys: Mapping[str, bool]) -> dict[str, Text]:
    for name, value in content.items():
        if not isinstance(value, dict):
            raise UsageError(f"{name!r} is outside of a table: add a line [{table}] above")
        if name not in COMMANDS:
            raise UsageError(f"there is no table [{name}]{_nearest(name, tuple(COMMANDS))}")
    found: dict[str, Text] = {}
    for name, value in content.get(table, {}).items():
        key = name.replace("-", "_")
        if key not in keys:
            raise UsageError(f"[{table}] has no setting {name!r}{_nearest(key, tuple(keys))}")
        if keys[key]:
            found[key] = _texts(f"[{table}] {name}", value)
        else:
            found[key] = _scalar(f"[{table}] {name}", value)
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    """Suggest the closest known name, or list all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; the known ones are {', '.join(known)}"


def _texts(where: str, value: Any) -> list[str]:
    """Return scalars as a person would type them, and the items of a table as NAME=VALUE."""
    if isinstance(value, dict):
        return [f"{key}={_scalar(where, item)}" for key, item in value.items()]
    items = value if isinstance(value, list) else [value]
    return [_scalar(where, item) for item in items]


def _scalar(where: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise UsageError(f"{where}: expected text, a number, true or false, not {value!r}")

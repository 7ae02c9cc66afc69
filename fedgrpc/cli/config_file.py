"""The TOML file of settings: one table per command. Values become text, and are then parsed as flags are."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrpc.cli import COMMANDS
from fedgrpc.errors import UsageError

Text = str | list[str]


def read_table(path: Path, table: str, keys: Mapping[str, bool]) -> dict[str, Text]:
    """Return the settings in `table` of the file, by key with underscores; none where it has no such table.

    `keys` are the known settings, and whether each may be given more than once, as a list or a table.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has an unknown table or key.
    """
    content = _parse(path)
    for name, value in content.items():
        if not isinstance(value, dict):
            raise UsageError(f"{path}: {name!r} is outside of a table: add a line [{table}] above")
        if name not in COMMANDS:
            raise UsageError(f"{path}: there is no table [{name}]{_nearest(name, tuple(COMMANDS))}")
    found: dict[str, Text] = {}
    for name, value in content.get(table, {}).items():
        key = name.replace("-", "_")
        if key not in keys:
            raise UsageError(f"{path}: [{table}] has no setting {name!r}{_nearest(key, tuple(keys))}")
        if keys[key]:
            found[key] = _texts(path, table, name, value)
        else:
            found[key] = _scalar(path, table, name, value)
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # tomllib also raises these, for numbers of thousands of digits and for deep nesting.
        raise UsageError(f"{path} is not valid TOML: {' '.join(str(error).split())}") from error


def _nearest(name: str, known: Sequence[str]) -> str:
    """Suggest the closest known name, or list all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; the known ones are {', '.join(known)}"


def _texts(path: Path, table: str, name: str, value: Any) -> list[str]:
    """Return scalars as a person would type them, and the items of a table as NAME=VALUE."""
    if isinstance(value, dict):
        return [f"{key}={_scalar(path, table, name, item)}" for key, item in value.items()]
    items = value if isinstance(value, list) else [value]
    return [_scalar(path, table, name, item) for item in items]


def _scalar(path: Path, table: str, name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise UsageError(f"{path}: [{table}] {name}: expected text, a number, true or false, not {value!r}")

"""Values as people write them: times (1.5s, 10m), sizes (256MiB), rates (50mbit), NAME=VALUE, and TOML files.

The rule: an error names the file. Settings in a file become text, and are then parsed as flags are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from fedgrpc import toml
from fedgrpc.cli import COMMANDS
from fedgrpc.errors import UsageError

T = TypeVar("T")
Text = str | list[str]

_NUMBER_AND_UNIT: Final = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z]*)\s*")

_MOST_CHARS: Final = 100


class Quantity(click.ParamType[Any]):
    """A number with a unit, converted to the unit that the table gives as 1, which is also the default unit.

    Values above `most` are refused: they would not fit into messages.
    """

    def __init__(
        self, name: str, units: Mapping[str, float], example: str, *, most: float, whole: bool = False
    ) -> None:
        self.name = name
        self._most = most
        self._units = units
        self._factors = {unit.lower(): factor for unit, factor in units.items()}
        self._example = example
        self._whole = whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        if isinstance(value, int | float):
            return value
        # The pattern takes time with the square of the length.
        match = _NUMBER_AND_UNIT.fullmatch(str(value)) if len(str(value)) <= _MOST_CHARS else None
        factor = self._factors.get(match[2].lower()) if match else None
        if match is None or factor is None:
            self.fail(f"{str(value)[:_MOST_CHARS]!r} must look like {self._example}", param, ctx)
        amount = float(match[1]) * factor
        if amount > self._most:
            self.fail(f"{value!r} is more than {self.show(self._most)}", param, ctx)
        return round(amount) if self._whole else amount

    def show(self, amount: float) -> str:
        """Return `amount` in the largest unit of which it is a whole number."""
        for unit, factor in sorted(self._units.items(), key=lambda each: -each[1]):
            if unit and amount >= factor and amount / factor == amount // factor:
                return f"{amount / factor:g}{unit}"
        return f"{amount:g}"


DURATION: Final = Quantity(
    "duration",
    {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600},
    "30, 1.5s, 10m or 2h",
    most=100_000 * 3600,
)
SIZE: Final = Quantity(
    "size",
    {
        **{"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9},
        **{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30},
    },
    "4096, 256MB or 4GiB",
    most=1 << 60,
    whole=True,
)
RATE: Final = Quantity(
    "rate", {"": 1, "bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}, "500kbit or 50mbit", most=1e14
)


class _CountOrNone(click.ParamType[Any]):
    """A whole number, or `none` for no limit."""

    name = "n|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if str(value).strip().lower() == "none":
            return None
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"{value!r} must be a whole number, or none", param, ctx)


ROUNDS: Final = _CountOrNone()


class NamedValues(click.ParamType[Any]):
    """NAME=VALUE as a pair."""

    name = "name=value"

    def __init__(self, number: bool = False) -> None:
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} must look like NAME=VALUE", param, ctx)
        try:
            return name, float(text) if self._number else text
        except ValueError:
            self.fail(f"{value!r} must look like NAME=0.5", param, ctx)


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


# Tables of an experiment: people give its file to --config as it stands.
_OF_EXPERIMENTS = ("learning", "devices", "availability")


def _settings(content: Mapping[str, Any], table: str, keys: Mapping[str, bool]) -> dict[str, Text]:
    for name, value in content.items():
        if name in _OF_EXPERIMENTS:
            raise UsageError(f"[{name}] is for `fedgrpc simulate`: copy [{table}] into a file of its own")
        if not isinstance(value, dict):
            raise UsageError(f"{name!r} is outside of a table: add a line [{table}] above")
        if name not in COMMANDS:
            raise UsageError(f"there is no table [{name}]{_nearest(name, tuple(COMMANDS))}")
    return texts_of(content.get(table, {}), table, keys)


def texts_of(values: Mapping[str, Any], table: str, keys: Mapping[str, bool]) -> dict[str, Text]:
    """Return the settings of a table as `read_table` does. Raises `UsageError` for an unknown key."""
    found: dict[str, Text] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in keys:
            raise UsageError(f"[{table}] has no setting {name!r}{_nearest(key, tuple(keys))}")
        if keys[key]:
            found[key] = plain_texts(f"[{table}] {name}", value)
        else:
            found[key] = _scalar(f"[{table}] {name}", value)
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    """Suggest the closest known name, or list all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; the known ones are {', '.join(known)}"


def plain_texts(where: str, value: Any) -> list[str]:
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

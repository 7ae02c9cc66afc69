"""The folder of one point of a sweep: what was asked, and its versions once it is done.

    point.json       the settings and the virtual hours
    versions.json    the versions, once the run has ended or the hours are over

The rule: a folder answers for the settings that it was begun with, and for no others. A point that is done is not
played again, unless more hours are asked: then it goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import UsageError
from fedgrpc.simulation.learning.versions import VersionRow

_POINT: Final = "point.json"
_DONE: Final = "versions.json"


class PointFolder:
    """The files of one point. `asked` is its experiment as a document."""

    def __init__(self, folder: Path, asked: Mapping[str, Any], hours: float) -> None:
        self.path = folder
        # As a file gives it back: dates are text, and numbers are those of JSON.
        self._asked = json.loads(json.dumps(asked, default=str))
        self._hours = hours

    def versions(self) -> list[VersionRow]:
        """Return the versions of a point that is done; else none. Raises `UsageError` for other settings."""
        begun = self._read(_POINT)
        if begun is not None:
            self._check(begun["asked"])
            if (hours := _hours_of(begun)) > self._hours:
                raise UsageError(
                    f"{self.path} has {hours:g} virtual hours, and the grid asks for {self._hours:g}: {_ELSEWHERE}"
                )
            if hours < self._hours:
                return []
        return [VersionRow(**values) for values in self._read(_DONE) or ()]

    def begin(self) -> None:
        """Note what is asked. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Before the new hours are noted: versions of fewer hours are none of them.
        (self.path / _DONE).unlink(missing_ok=True)
        self._write(_POINT, {"asked": self._asked, "hours": None if math.isinf(self._hours) else self._hours})

    def finish(self, rows: Sequence[VersionRow]) -> None:
        """Note that the point is done. Raises OSError."""
        self._write(_DONE, [vars(row) for row in rows])

    def _check(self, begun: Mapping[str, Any]) -> None:
        now, before = _flat(self._asked), _flat(begun)
        for name in sorted({*now, *before}):
            if now.get(name) != before.get(name):
                raise UsageError(
                    f"{self.path} was begun with {name} = {before.get(name)!r}, and the grid asks for "
                    f"{now.get(name)!r}: {_ELSEWHERE}"
                )

    def _read(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error

    def _write(self, name: str, content: Any) -> None:
        unfinished = self.path / f"{name}.part"
        unfinished.write_text(json.dumps(content, default=dict))
        unfinished.replace(self.path / name)


_ELSEWHERE: Final = "name another folder with --out"


def _hours_of(begun: Mapping[str, Any]) -> float:
    return math.inf if begun["hours"] is None else float(begun["hours"])


def _flat(document: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by `TABLE.KEY`."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict | list) else {name: value}
    return found

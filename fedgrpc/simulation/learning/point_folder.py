"""The folder of one point of a sweep: what was asked, and its versions once it is done.

    point.json       the settings and the virtual hours
    versions.json    the versions, once the run has ended or the hours are over

The rule: a folder answers for the settings that it was begun with, and for no others. A point that is done is not
played again, unless more hours are asked: then it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import UsageError
from fedgrpc.simulation.learning.asked import ELSEWHERE, as_read, check_same, read_json, write_json
from fedgrpc.simulation.learning.versions import VersionRow

_POINT: Final = "point.json"
_DONE: Final = "versions.json"


class PointFolder:
    """The files of one point. `asked` is its experiment as a document."""

    def __init__(self, folder: Path, asked: Mapping[str, Any], hours: float) -> None:
        self.path = folder
        self._asked = as_read(asked)
        self._hours = hours

    def versions(self) -> list[VersionRow]:
        """Return the versions of a point that is done; else none. Raises `UsageError` for other settings."""
        begun = read_json(self.path / _POINT)
        if begun is not None:
            check_same(self.path, begun["asked"], self._asked, "the grid")
            if (hours := _hours_of(begun)) > self._hours:
                raise UsageError(
                    f"{self.path} has {hours:g} virtual hours, and the grid asks for {self._hours:g}: {ELSEWHERE}"
                )
            if hours < self._hours:
                return []
        return [VersionRow(**values) for values in read_json(self.path / _DONE) or ()]

    def begin(self) -> None:
        """Note what is asked. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Before the new hours are noted: versions of fewer hours are none of them.
        (self.path / _DONE).unlink(missing_ok=True)
        hours = None if math.isinf(self._hours) else self._hours
        write_json(self.path / _POINT, {"asked": self._asked, "hours": hours})

    def finish(self, rows: Sequence[VersionRow]) -> None:
        """Note that the point is done. Raises OSError."""
        write_json(self.path / _DONE, [vars(row) for row in rows])


def _hours_of(begun: Mapping[str, Any]) -> float:
    return math.inf if begun["hours"] is None else float(begun["hours"])

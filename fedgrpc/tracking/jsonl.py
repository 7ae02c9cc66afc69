"""Figures as lines of JSON, appended to a file: `{"run": ..., "step": 3, "at_s": ..., "accuracy": 0.91, ...}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from fedgrpc.errors import UsageError


class JsonLines:
    """A `Tracker`. The first line of a run has its settings; every line is written at once."""

    def __init__(self, target: str) -> None:
        """Raises `UsageError` for a file that cannot be written."""
        try:
            self._file: TextIO = Path(target).open("a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"cannot track to {target}: {error.strerror}") from None
        self._run = ""

    def begin(self, run: str, settings: Mapping[str, str]) -> None:
        """Write the settings."""
        self._run = run
        self._write({"run": run, "settings": dict(settings)})

    def log(self, step: int, values: Mapping[str, float], at_s: float) -> None:
        """Write a line of figures."""
        self._write({"run": self._run, "step": step, "at_s": round(at_s, 3), **values})

    def end(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")

"""Health of the data folder: logged once when something fails, and again when it works.

The rule: as long as rounds or updates cannot be stored the aggregator does not serve, and says so in its health.
Old files that cannot be removed hold nothing up.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any


class Use(Enum):
    """Use of the data folder."""

    ROUNDS = "rounds"
    UPDATES = "updates"
    OLD_FILES = "removing old files"


class DataFolder:
    """Health of one data folder. `changed` is called when it begins to fail, and when it works again."""

    def __init__(self, log: Any, changed: Callable[[], None]) -> None:
        self._log = log
        self._changed = changed
        self._failing: dict[Use, str] = {}

    @property
    def healthy(self) -> bool:
        """True if the last attempts to store rounds and updates have worked."""
        return not self._failing.keys() - {Use.OLD_FILES}

    def failed(self, use: Use, error: Exception) -> None:
        """Note a failure."""
        reason = str(error)
        # Hundreds of workers may try again every second on a full disk: the same reason is logged once.
        if self._failing.get(use) != reason:
            self._failing[use] = reason
            self._log.error("the data folder fails", use=use.value, error=reason)
            self._changed()

    def works(self, use: Use) -> None:
        """Note a success."""
        if self._failing.pop(use, None) is not None:
            self._log.info("the data folder works again", use=use.value)
            self._changed()

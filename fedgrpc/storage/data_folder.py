"""Whether the data folder works: said once in the log when something fails, and again when it mends.

The rule: as long as rounds or updates cannot be stored the aggregator does not serve, and says so in its health.
Old files that cannot be removed hold nothing up.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any


class Use(Enum):
    """What the data folder is needed for."""

    ROUNDS = "rounds"
    UPDATES = "updates"
    OLD_FILES = "removing old files"


class DataFolder:
    """The state of one data folder. `changed` is called when it begins to fail, and when it works again."""

    def __init__(self, log: Any, changed: Callable[[], None]) -> None:
        self._log = log
        self._changed = changed
        self._failing: dict[Use, str] = {}

    @property
    def healthy(self) -> bool:
        """Whether rounds and updates can be stored, as far as the last try of each says."""
        return not self._failing.keys() - {Use.OLD_FILES}

    def failed(self, use: Use, error: Exception) -> None:
        """It did not work just now. Who tries again and again for the same reason is heard once."""
        reason = str(error)
        if self._failing.get(use) != reason:
            self._failing[use] = reason
            self._log.error("the data folder fails", use=use.value, error=reason)
            self._changed()

    def works(self, use: Use) -> None:
        """It worked just now."""
        if self._failing.pop(use, None) is not None:
            self._log.info("the data folder works again", use=use.value)
            self._changed()

"""Syncs of one folder that many threads ask for: those that wait at the same time share one.

The rule: whoever returns was covered by a sync that began after it asked. A sync that fails fails all whom it was
to cover: Linux may take the entries for clean from then on, so that the next one would succeed without them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from fedgrpc.storage.files import sync


class GroupedSyncs:
    """Syncs of the entries of `folder`. Thread-safe."""

    def __init__(self, folder: Path, sync_folder: Callable[[Path], None] = sync) -> None:
        self._folder = folder
        self._sync_folder = sync_folder
        self._changed = threading.Condition()
        self._asked = self._ended = 0
        self._running = False
        # Requests whose sync has failed, until they know.
        self._failures: dict[int, OSError] = {}

    def sync(self) -> None:
        """Return once the entries that are there now survive a power cut. Raises OSError."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.wait_for(lambda: self._ended >= mine or not self._running)
            if self._ended >= mine:
                if mine in self._failures:
                    raise self._failures.pop(mine)
                return
            covered = range(self._ended + 1, self._asked + 1)
            self._running = True
        try:
            self._sync_folder(self._folder)
        except OSError as error:
            with self._changed:
                self._failures.update((each, error) for each in covered if each != mine)
            raise
        finally:
            with self._changed:
                self._running, self._ended = False, covered.stop - 1
                self._changed.notify_all()

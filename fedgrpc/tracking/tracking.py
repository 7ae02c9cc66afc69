"""Trackers in a thread of their own: slow or broken ones cost their figures, and never the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

from fedgrpc.tracking.tracker import Tracker

# Rounds are slow beside any tracker that works. One that hangs is left behind here.
_MOST_WAITING: Final = 1000
_PATIENCE_S: Final = 10.0

log = structlog.get_logger()


class Tracking:
    """The trackers of one run. Calls return at once."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._dropped = False

    def begin(self, run: str, settings: Mapping[str, str]) -> None:
        """Start with a run of that name and these settings."""
        if self._trackers and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()
        self._tell(lambda tracker: tracker.begin(run, settings))

    def log(self, step: int, values: Mapping[str, float], at_s: float) -> None:
        """Hand over the figures of a step; nothing for none."""
        if values:
            self._tell(lambda tracker: tracker.log(step, values, at_s))

    def end(self) -> None:
        """Let trackers write what they have, for up to ten seconds."""
        if self._thread is None:
            return
        self._tell(lambda tracker: tracker.end())
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_PATIENCE_S)

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            if not self._dropped:
                log.warning("figures not tracked", reason="the tracker is too slow")
            self._dropped = True

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            for tracker in list(self._trackers):
                try:
                    call(tracker)
                # A library of others may raise anything, which must not end the run.
                except Exception as error:  # noqa: BLE001
                    self._trackers.remove(tracker)
                    log.warning("tracker left out", tracker=type(tracker).__name__, reason=str(error)[:300])


NOT_TRACKED: Final = Tracking(())

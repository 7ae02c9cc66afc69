"""One task on one device of a simulated fleet: how far it is, and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedgrpc.rounds.events import Progress, TaskPhase

Fate = Literal["", "merged", "late", "failed", "in vain"]


@dataclass(slots=True)
class Job:
    """Costs in bytes and seconds; `fate` empty: it goes on, or its update waits for a commit."""

    token: str
    device: int
    offered_at: float
    phase: TaskPhase = TaskPhase.OFFERED
    entered_at: float = 0.0
    size_bytes: int = 0
    held_bytes: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    trained_s: float = 0.0
    staleness: int = 0
    merged_at: float | None = None
    ended_at: float | None = None
    fate: Fate = ""

    @property
    def over(self) -> bool:
        """Whether its device has stopped."""
        return self.ended_at is not None or self.fate in ("late", "failed")

    def enter(self, phase: TaskPhase, now: float) -> None:
        """Begin a part of the task."""
        self.phase, self.entered_at, self.held_bytes, self.size_bytes = phase, now, 0, 0

    def moved(self, held_bytes: float) -> None:
        """That much of the payload has been transferred."""
        self.held_bytes = round(held_bytes)
        if self.phase is TaskPhase.DOWNLOADING:
            self.down_bytes = self.held_bytes
        else:
            self.up_bytes = self.held_bytes

    def progress(self) -> Progress:
        """What a heartbeat says."""
        if self.phase is TaskPhase.UPLOADING:
            return Progress(self.token, self.phase, 0.0, self.held_bytes, self.size_bytes)
        return Progress(self.token, self.phase)

    def stop(self, fate: Fate) -> None:
        """It is of no use any more."""
        self.fate = fate

    def end(self, now: float) -> None:
        """Its device has done with it."""
        self.ended_at = now

    def merge(self, now: float, staleness: int) -> None:
        """Its update is in a version."""
        self.fate, self.merged_at, self.staleness = "merged", now, staleness

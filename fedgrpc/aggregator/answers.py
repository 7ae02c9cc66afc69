"""Answers of the coordinator to workers, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat."""

    cancel: bool
    reason: str = ""
    time_left_s: float | None = None

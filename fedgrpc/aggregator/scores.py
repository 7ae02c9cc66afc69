"""Scores on a log line."""

from __future__ import annotations

from collections.abc import Mapping


def for_log(metrics: Mapping[str, float], *own: str) -> dict[str, float]:
    """Scores as keys of a log line that has the keys `own`: workers choose the names of their scores."""
    taken = {"event", "run", "level", "timestamp", *own}
    return {f"score_{name}" if name in taken else name: value for name, value in metrics.items()}

"""Result of a simulated fleet: rounds, participation, bytes, wasted work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedgrpc.simulation.devices import Devices, Job
from fedgrpc.simulation.fleet import FleetVariant


@dataclass(frozen=True)
class RoundLine:
    """One round; times in seconds from the start."""

    number: int
    opened_at: float
    ended_at: float
    committed: bool
    asked: int
    accepted: int
    deadline_s: float


@dataclass(frozen=True)
class ClassLine:
    """One class of devices: tasks begun, the share of them merged, and the share of devices that took part."""

    name: str
    devices: int
    tasks: int
    merged_share: float
    took_part_share: float


@dataclass(frozen=True)
class FleetResult:
    """One variant. Shares from 0 to 1; `wasted_*` is what went into updates that no version has.

    Tasks that were still going on at the end, or whose updates waited for a commit, are in neither.
    `took_part_at`: for each device that took part, when its first update was merged.
    """

    name: str
    hours: float
    rounds: int
    abandoned: int
    updates: int
    round_s_median: float
    round_s_p95: float
    took_part_share: float
    stale_share: float
    down_bytes: int
    up_bytes: int
    wasted_bytes_share: float
    trained_hours: float
    wasted_training_share: float
    classes: tuple[ClassLine, ...]
    lines: tuple[RoundLine, ...]
    took_part_at: tuple[float, ...]

    @property
    def rounds_per_hour(self) -> float:
        """Versions committed in an hour."""
        return self.rounds / self.hours

    def to_json(self) -> dict[str, Any]:
        """Return everything but the long lists, for programs."""
        values = asdict(self)
        del values["lines"], values["took_part_at"]
        return {**values, "rounds_per_hour": self.rounds_per_hour}


def summarize(
    variant: FleetVariant, devices: Devices, lines: Sequence[RoundLine], jobs: Sequence[Job], duration_s: float
) -> FleetResult:
    """Add it all up."""
    committed = [line for line in lines if line.committed]
    lengths = [line.ended_at - line.opened_at for line in committed] or [0.0]
    done = [job for job in jobs if job.fate]
    merged = [job for job in done if job.fate == "merged"]
    first: dict[int, float] = {}
    for job in merged:
        first.setdefault(job.device, job.merged_at or 0.0)
    spent_bytes = sum(job.down_bytes + job.up_bytes for job in done)
    used_bytes = sum(job.down_bytes + job.up_bytes for job in merged)
    trained_s = sum(job.trained_s for job in done)
    return FleetResult(
        name=variant.name,
        hours=duration_s / 3600,
        rounds=len(committed),
        abandoned=len(lines) - len(committed),
        updates=len(merged),
        round_s_median=float(np.median(lengths)),
        round_s_p95=float(np.quantile(lengths, 0.95)),
        took_part_share=len(first) / devices.count,
        stale_share=_share(sum(job.staleness > 0 for job in merged), len(merged)),
        down_bytes=sum(job.down_bytes for job in jobs),
        up_bytes=sum(job.up_bytes for job in jobs),
        wasted_bytes_share=_share(spent_bytes - used_bytes, spent_bytes),
        trained_hours=float(trained_s / 3600),
        wasted_training_share=_share(trained_s - sum(job.trained_s for job in merged), trained_s),
        classes=tuple(_class_lines(devices, done, first)),
        lines=tuple(lines),
        took_part_at=tuple(sorted(first.values())),
    )


def _class_lines(devices: Devices, done: Sequence[Job], first: dict[int, float]) -> list[ClassLine]:
    lines = []
    for number, one in enumerate(devices.classes):
        jobs = [job for job in done if devices.class_of[job.device] == number]
        merged = sum(job.fate == "merged" for job in jobs)
        took_part = sum(devices.class_of[device] == number for device in first)
        lines.append(
            ClassLine(one.name, one.count, len(jobs), _share(merged, len(jobs)), _share(took_part, one.count))
        )
    return lines


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0

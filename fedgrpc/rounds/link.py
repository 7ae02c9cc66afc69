"""How fast a worker's link is, by what went through it.

The rule: a transfer that is small, or over at once, tells of the round trip and of a busy machine, not of the
link, unless it was faster than the link was thought to be. Medians, not means: one bad night is not what a link is
like.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from fedgrpc import claims
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.task import Task

KEPT = 5
_LONG_S = 0.2
# However few bytes: nothing but the link takes so long.
_VERY_LONG_S = 10.0
_LARGE_BYTES = 1 << 20
_SMALL_BYTES = 16 << 10


@dataclass(frozen=True)
class Rates:
    """One direction of one worker's link: bytes a second of the last transfers that told it, newest last."""

    told: tuple[float, ...] = ()

    @property
    def bytes_per_second(self) -> float | None:
        """What is to be expected; None: nothing has told."""
        return statistics.median(self.told) if self.told else None

    def after(self, size_bytes: float, seconds: float) -> Rates:
        """With one more transfer, if that tells anything."""
        if size_bytes <= 0 or seconds <= 0:
            return self
        rate, known = claims.BYTES_PER_SECOND.clamped(size_bytes / seconds), self.bytes_per_second
        faster = known is not None and rate > known
        long = seconds >= _LONG_S or size_bytes >= _LARGE_BYTES or faster
        if seconds >= _VERY_LONG_S or (size_bytes >= _SMALL_BYTES and long):
            return Rates((*self.told, rate)[-KEPT:])
        return self


NO_RATES = Rates()


def cut_upload(task: Task) -> tuple[float, float]:
    """Bytes of an update that came before its task was over, and the seconds they took; (0, 0): none did."""
    begun = task.entered.get(TaskPhase.UPLOADING)
    if task.pace is None or begun is None or not _cut(task):
        return 0.0, 0.0
    return float(task.pace.held), task.pace.gained_at - begun


def cut_download(task: Task, size_bytes: float) -> tuple[float, float]:
    """The same of a model of `size_bytes` that never came whole, by what its worker said of it."""
    begun = task.entered.get(TaskPhase.DOWNLOADING)
    further = TaskPhase.TRAINING in task.entered or TaskPhase.UPLOADING in task.entered
    if begun is None or further or not (over := _cut(task)):
        return 0.0, 0.0
    return task.fraction * size_bytes, over[0] - begun


def _cut(task: Task) -> list[float]:
    return [task.entered[phase] for phase in (TaskPhase.LATE, TaskPhase.EXPIRED) if phase in task.entered]

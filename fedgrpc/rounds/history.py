"""What is remembered of each worker: how long its tasks took, what they were worth, when it last took part.

The rule: bounded. Quantiles, not means: one bad night of a link is not what a worker is like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.link import NO_RATES, Rates
from fedgrpc.rounds.task import SLOW, Task

KEPT = 16
# A part that was cut short took longer than was seen; how much longer nobody knows.
CUT_FACTOR = 1.5


@dataclass(frozen=True)
class Timing:
    """T_download, T_local and T_upload of one task, in seconds; None: it did not come to that part.

    `cut`: the last part that is not None was not finished, so that it takes longer than that.
    """

    download_s: float | None = None
    local_s: float | None = None
    upload_s: float | None = None
    cut: bool = False

    @property
    def parts(self) -> tuple[float | None, float | None, float | None]:
        """The three in their order, a part that was cut being longer than it was seen to be."""
        parts = [self.download_s, self.local_s, self.upload_s]
        if self.cut:
            last = max((i for i, part in enumerate(parts) if part is not None), default=None)
            if last is not None:
                parts[last] = (parts[last] or 0.0) * CUT_FACTOR
        return parts[0], parts[1], parts[2]


def timing_of(task: Task) -> Timing | None:
    """Where a task's time went, as the aggregator saw it; None: its worker never came for it.

    The worker's own account of an accepted task is finer: it knows to the moment when it began to train.
    """
    entered = task.entered
    ends = [
        entered[phase] for phase in (TaskPhase.ACCEPTED, TaskPhase.LATE, TaskPhase.EXPIRED) if phase in entered
    ]
    starts = [entered.get(phase) for phase in (TaskPhase.DOWNLOADING, TaskPhase.TRAINING, TaskPhase.UPLOADING)]
    if not ends or starts == [None] * 3:
        return None
    parts: list[float | None] = [None, None, None]
    end = ends[0]
    for index in (2, 1, 0):
        start = starts[index]
        if start is not None:
            parts[index], end = max(0.0, end - start), start
    return Timing(parts[0], parts[1], parts[2], cut=TaskPhase.ACCEPTED not in entered)


def timing_of_accepted(task: Task, said: Timing, most_s: float) -> Timing:
    """Where an accepted task's time went, by what its worker said of it, as far as that can be.

    The parts together are no less than what the aggregator saw from the worker's first sign of life to its update,
    and no more than what passed since the offer; after a restart, which forgets both, no more than `most_s`.
    """
    entered = task.entered
    end = entered.get(TaskPhase.ACCEPTED)
    signs = [entered[p] for p in (TaskPhase.DOWNLOADING, TaskPhase.TRAINING, TaskPhase.UPLOADING) if p in entered]
    whole = end is not None and TaskPhase.OFFERED in entered
    at_most_s = end - entered[TaskPhase.OFFERED] if end is not None and whole else most_s
    at_least_s = end - min(signs) if end is not None and whole and signs else 0.0
    download_s = min(said.download_s or 0.0, at_most_s)
    upload_s = min(said.upload_s or 0.0, at_most_s - download_s)
    rest_s = at_most_s - download_s - upload_s
    local_s = min(max(said.local_s or 0.0, at_least_s - download_s - upload_s), rest_s)
    return Timing(download_s, local_s, upload_s)


def ending(task: Task) -> str:
    """How a task ended: "accepted", "rejected", "failed", or what it was too slow in."""
    slow = task.reason.partition(":")[0]
    return slow if slow in SLOW.values() else task.phase.name.lower()


@dataclass(frozen=True)
class WorkerHistory:
    """One worker. `loss` and `example_count` are those of its last update; `selected_in` the last round.

    `endings` tells how its last tasks ended, `timings` where their time went, `uplink` and `downlink` how fast its
    bytes went up and down.
    """

    timings: tuple[Timing, ...] = ()
    selected: int = 0
    accepted: int = 0
    selected_in: int = 0
    loss: float | None = None
    example_count: int = 0
    endings: tuple[str, ...] = ()
    uplink: Rates = NO_RATES
    downlink: Rates = NO_RATES

    def chosen(self, round_number: int) -> WorkerHistory:
        """After it was given a task."""
        return replace(self, selected=self.selected + 1, selected_in=round_number)

    def ended(self, how: str) -> WorkerHistory:
        """After a task, however it ended."""
        return replace(self, endings=(*self.endings, how)[-KEPT:])

    def timed(self, timing: Timing) -> WorkerHistory:
        """After a task of which it is known how long it took."""
        return replace(self, timings=(*self.timings, timing)[-KEPT:])

    def reported(self, timing: Timing, loss: float | None, example_count: int) -> WorkerHistory:
        """After an accepted update; `loss` is the mean over its examples."""
        done = self.timed(timing)
        return replace(done, accepted=self.accepted + 1, loss=loss, example_count=example_count)


Histories = Mapping[str, WorkerHistory]


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed. Raises `ValueError` for no values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def expected_parts(history: WorkerHistory, share: float) -> list[float | None]:
    """The `share` quantile of each part of a task, in seconds; None: never seen."""
    columns = zip(*(timing.parts for timing in history.timings), strict=True)
    seen = [[part for part in column if part is not None] for column in columns] or [[], [], []]
    return [quantile(column, share) if column else None for column in seen]


def expected_s(history: WorkerHistory, share: float, usual: Sequence[float | None] = (None,) * 3) -> float | None:
    """How long its next task takes at most, `share` of the times; parts never seen take what is `usual`.

    None when a part is neither known nor usual.
    """
    parts = [
        own if own is not None else other for own, other in zip(expected_parts(history, share), usual, strict=True)
    ]
    return None if None in parts else sum(part for part in parts if part is not None)


def usual_parts(histories: Iterable[WorkerHistory], share: float) -> list[float | None]:
    """The median worker's parts."""
    columns = list(zip(*(expected_parts(history, share) for history in histories), strict=True)) or [(), (), ()]
    seen = [[part for part in column if part is not None] for column in columns]
    return [quantile(column, 0.5) if column else None for column in seen]

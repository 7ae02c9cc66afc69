"""What is remembered of each worker: how long its tasks took, what they were worth, when it last took part.

The rule: bounded. Quantiles, not means: one bad night of a link is not what a worker is like.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedgrpc import claims
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.round import Round
from fedgrpc.rounds.task import Task

KEPT = 16
# A part that was cut short took longer than was seen; how much longer nobody knows.
CUT_FACTOR = 1.5
KEPT_RATES = 5
_LONG_S = 0.2
# However few bytes: nothing but the link takes so long.
_VERY_LONG_S = 10.0
_LARGE_BYTES = 1 << 20
_SMALL_BYTES = 16 << 10
_PATIENCE = 2
_MOST_DOUBLINGS = 8
_LONGEST_S = 24 * 3600.0


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


@dataclass(frozen=True)
class LinkRates:
    """One direction of one worker's link: bytes a second of its last informative transfers, newest last.

    A small or very short transfer measures the round trip and a busy machine, not the link. It counts only where
    it was faster than the link was thought to be.
    """

    samples: tuple[float, ...] = ()

    @property
    def bytes_per_second(self) -> float | None:
        """The median; None: no informative transfer yet."""
        return statistics.median(self.samples) if self.samples else None

    def after(self, size_bytes: float, seconds: float) -> LinkRates:
        """With one more transfer, if that tells anything."""
        if size_bytes <= 0 or seconds <= 0:
            return self
        rate, known = claims.BYTES_PER_SECOND.clamped(size_bytes / seconds), self.bytes_per_second
        faster = known is not None and rate > known
        long = seconds >= _LONG_S or size_bytes >= _LARGE_BYTES or faster
        if seconds >= _VERY_LONG_S or (size_bytes >= _SMALL_BYTES and long):
            return LinkRates((*self.samples, rate)[-KEPT_RATES:])
        return self


NO_RATES = LinkRates()


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
    endings: tuple[LossCause, ...] = ()
    uplink: LinkRates = NO_RATES
    downlink: LinkRates = NO_RATES

    def chosen(self, round_number: int) -> WorkerHistory:
        """After it was given a task."""
        return replace(self, selected=self.selected + 1, selected_in=round_number)

    def ended(self, cause: LossCause) -> WorkerHistory:
        """Return the history after a task that was lost for `cause`; `NONE`: it was accepted."""
        return replace(self, endings=(*self.endings, cause)[-KEPT:])

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


def cut_upload(task: Task) -> tuple[float, float]:
    """Bytes of an update that came before its task was over, and the seconds they took; (0, 0): none did."""
    begun = task.entered.get(TaskPhase.UPLOADING)
    if task.pace is None or begun is None or not _cut_at(task):
        return 0.0, 0.0
    return float(task.pace.held), task.pace.gained_at - begun


def cut_download(task: Task, size_bytes: float) -> tuple[float, float]:
    """The same of a model of `size_bytes` that never came whole, by what its worker said of it."""
    begun = task.entered.get(TaskPhase.DOWNLOADING)
    further = TaskPhase.TRAINING in task.entered or TaskPhase.UPLOADING in task.entered
    if begun is None or further or not (over := _cut_at(task)):
        return 0.0, 0.0
    return task.fraction * size_bytes, over[0] - begun


def _cut_at(task: Task) -> list[float]:
    return [task.entered[phase] for phase in (TaskPhase.LATE, TaskPhase.EXPIRED) if phase in task.entered]


@dataclass(frozen=True)
class Trust:
    """How many of its last rounds in a row a worker held up, and until when it is doubted for that, seconds.

    A worker that held up two rounds in a row, and delivered in neither, is chosen only where there are too few
    others, for a time that doubles with each further round. One delivery clears it.
    """

    held_up: int = 0
    doubted_until: float = 0.0

    def doubted(self, now: float) -> bool:
        """Whether others are to be chosen first."""
        return now < self.doubted_until

    def after(self, round_: Round, task: Task, now: float) -> Trust:
        """What a task of a round that has ended makes of it. A round that had enough was held up by nobody."""
        if task.phase is TaskPhase.ACCEPTED:
            return Trust()
        if task.phase not in (TaskPhase.LATE, TaskPhase.EXPIRED) or round_.enough_reason:
            return self
        held_up = self.held_up + 1
        if held_up < _PATIENCE:
            return Trust(held_up)
        doublings = min(held_up - _PATIENCE + 1, _MOST_DOUBLINGS)
        return Trust(held_up, now + min(_LONGEST_S, round_.policy.deadline_s * 2**doublings))

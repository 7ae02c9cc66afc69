"""History of each worker: how long its tasks took, how fast its link is, how they ended.

Every history is bounded. Times are quantiles and rates medians, not means: one bad night is not typical of a
worker.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedgrpc import claims
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.task import Task

KEPT = 16
# A part that was cut off took longer than was seen. How much longer is not known: assume half as much again.
CUT_FACTOR = 1.5
KEPT_RATES = 5
_LONG_S = 0.2
# A transfer that takes this long measures the link, however few its bytes.
_VERY_LONG_S = 10.0
_LARGE_BYTES = 1 << 20
_SMALL_BYTES = 16 << 10
_PATIENCE = 2
_MOST_DOUBLINGS = 8
_LONGEST_S = 24 * 3600.0


@dataclass(frozen=True)
class Timings:
    """Parts of a worker's time in a round: T = T_local + T_upload + T_global + T_download, in seconds."""

    download_s: float = 0.0
    local_s: float = 0.0
    upload_s: float = 0.0
    global_s: float = 0.0


@dataclass(frozen=True)
class Timing:
    """T_download, T_local and T_upload of one task, in seconds; None: the task did not come to that part.

    `cut`: the last part that is not None was not finished, so it takes longer than that.
    """

    download_s: float | None = None
    local_s: float | None = None
    upload_s: float | None = None
    cut: bool = False

    @property
    def parts(self) -> tuple[float | None, float | None, float | None]:
        """The three parts in order. One that was cut off counts `CUT_FACTOR` times."""
        parts = [self.download_s, self.local_s, self.upload_s]
        if self.cut:
            last = max((i for i, part in enumerate(parts) if part is not None), default=None)
            if last is not None:
                parts[last] = (parts[last] or 0.0) * CUT_FACTOR
        return parts[0], parts[1], parts[2]


def timing_of(task: Task) -> Timing | None:
    """Return where a task's time went, as the aggregator saw it; None: its worker never came for it.

    The worker's own account of an accepted task is more exact: it knows when it began to train.
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
    # Backwards: a part ends where the next one that was seen begins. A phase may have been skipped.
    for index in (2, 1, 0):
        start = starts[index]
        if start is not None:
            parts[index], end = max(0.0, end - start), start
    return Timing(parts[0], parts[1], parts[2], cut=TaskPhase.ACCEPTED not in entered)


def timing_of_accepted(task: Task, said: Timing, most_s: float) -> Timing:
    """Return where an accepted task's time went: what its worker `said`, within what the aggregator saw.

    The parts together are at least the time from the worker's first sign of life to its update, and at most the
    time since the offer. After a restart, which forgets both, they are at most `most_s`.
    """
    entered = task.entered
    end = entered.get(TaskPhase.ACCEPTED)
    signs = [entered[p] for p in (TaskPhase.DOWNLOADING, TaskPhase.TRAINING, TaskPhase.UPLOADING) if p in entered]
    whole = end is not None and TaskPhase.OFFERED in entered
    at_most_s = end - entered[TaskPhase.OFFERED] if end is not None and whole else most_s
    at_least_s = end - min(signs) if end is not None and whole and signs else 0.0
    # Transfers first, since the aggregator saw their bytes. The local work takes what remains.
    download_s = min(said.download_s or 0.0, at_most_s)
    upload_s = min(said.upload_s or 0.0, at_most_s - download_s)
    rest_s = at_most_s - download_s - upload_s
    local_s = min(max(said.local_s or 0.0, at_least_s - download_s - upload_s), rest_s)
    return Timing(download_s, local_s, upload_s)


@dataclass(frozen=True)
class LinkRates:
    """One direction of a worker's link: bytes a second of its last informative transfers, newest last.

    A small or very short transfer measures the round trip and a busy machine, not the link. It counts only where
    it was faster than the link was thought to be.
    """

    samples: tuple[float, ...] = ()

    @property
    def bytes_per_second(self) -> float | None:
        """The median; None: no informative transfer yet."""
        return statistics.median(self.samples) if self.samples else None

    def after(self, size_bytes: float, seconds: float) -> LinkRates:
        """Return the rates with one more transfer, if it is informative."""
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
    """Past of one worker, as far as it is remembered.

    `loss` and `example_count` are those of its last update, `selected_in` is the last round that chose it.
    `endings` holds how its last tasks ended (`NONE`: accepted), `timings` where their time went.
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
        """Return the history after the worker got a task."""
        return with_fields(self, selected=self.selected + 1, selected_in=round_number)

    def ended(self, cause: LossCause) -> WorkerHistory:
        """Return the history after a task that was lost for `cause`; `NONE`: it was accepted."""
        return with_fields(self, endings=(*self.endings, cause)[-KEPT:])

    def timed(self, timing: Timing) -> WorkerHistory:
        """Return the history after a task whose times are known."""
        return with_fields(self, timings=(*self.timings, timing)[-KEPT:])

    def reported(self, timing: Timing, loss: float | None, example_count: int) -> WorkerHistory:
        """Return the history after an accepted update; `loss` is the mean over its examples."""
        done = self.timed(timing)
        return with_fields(done, accepted=self.accepted + 1, loss=loss, example_count=example_count)


Histories = Mapping[str, WorkerHistory]


def quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed. Raises `ValueError`."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def expected_parts(history: WorkerHistory, share: float) -> list[float | None]:
    """Return the `share` quantile of each part of a task, in seconds; None: never seen."""
    columns = zip(*(timing.parts for timing in history.timings), strict=True)
    seen = [[part for part in column if part is not None] for column in columns] or [[], [], []]
    return [quantile(column, share) if column else None for column in seen]


def expected_s(history: WorkerHistory, share: float, usual: Sequence[float | None] = (None,) * 3) -> float | None:
    """Return the time that the worker's next task takes at most, in `share` of the cases.

    Parts never seen take what is `usual`. None when a part is neither known nor usual.
    """
    parts = [
        own if own is not None else other for own, other in zip(expected_parts(history, share), usual, strict=True)
    ]
    # The sum of high quantiles is usually above the quantile of the sum: a deadline made of it is on the safe
    # side.
    return None if None in parts else sum(part for part in parts if part is not None)


def usual_parts(histories: Iterable[WorkerHistory], share: float) -> list[float | None]:
    """Return the parts of the median worker, in seconds."""
    columns = list(zip(*(expected_parts(history, share) for history in histories), strict=True)) or [(), (), ()]
    seen = [[part for part in column if part is not None] for column in columns]
    return [quantile(column, 0.5) if column else None for column in seen]


def cut_upload(task: Task) -> tuple[float, float]:
    """Return the bytes of a lost task's upload that arrived, and their seconds; (0, 0): none did."""
    begun = task.entered.get(TaskPhase.UPLOADING)
    if task.pace is None or begun is None or not _cut_at(task):
        return 0.0, 0.0
    return float(task.pace.held), task.pace.gained_at - begun


def cut_download(task: Task, size_bytes: float) -> tuple[float, float]:
    """Return the same of a model of `size_bytes` whose download was never finished, by the worker's progress."""
    begun = task.entered.get(TaskPhase.DOWNLOADING)
    further = TaskPhase.TRAINING in task.entered or TaskPhase.UPLOADING in task.entered
    if begun is None or further or not (over := _cut_at(task)):
        return 0.0, 0.0
    return task.fraction * size_bytes, over[0] - begun


def _cut_at(task: Task) -> list[float]:
    return [task.entered[phase] for phase in (TaskPhase.LATE, TaskPhase.EXPIRED) if phase in task.entered]


@dataclass(frozen=True)
class Punctuality:
    """Number of last rounds in a row that a worker held up, and the end of the doubt about it, seconds.

    A worker that held up two rounds in a row, and delivered in neither, is chosen only where there are too few
    others, for a time that doubles with each further round. One delivery clears it. Who gives its task back or is
    refused holds up a round that is abandoned. Who got its task in the second half of a round holds up nothing.
    """

    held_up: int = 0
    doubted_until: float = 0.0

    def doubted(self, now: float) -> bool:
        """Return whether other workers are chosen first."""
        return now < self.doubted_until

    def after(self, round_: Round, task: Task, now: float) -> Punctuality:
        """Return the trust after a task of a round that has ended. No worker holds up a round that had enough."""
        if task.phase is TaskPhase.ACCEPTED:
            return Punctuality()
        late = task.phase in (TaskPhase.LATE, TaskPhase.EXPIRED)
        failed = task.phase in (TaskPhase.FAILED, TaskPhase.REJECTED) and round_.phase is RoundPhase.ABANDONED
        given_at = task.entered.get(TaskPhase.OFFERED, round_.opened_at)
        in_place_of_another = given_at > round_.opened_at + round_.policy.deadline_s / 2
        if not (late or failed) or round_.enough_reason or in_place_of_another:
            return self
        held_up = self.held_up + 1
        if held_up < _PATIENCE:
            return Punctuality(held_up)
        # In units of the policy's deadline: what the worker has cost each round.
        doublings = min(held_up - _PATIENCE + 1, _MOST_DOUBLINGS)
        return Punctuality(held_up, now + min(_LONGEST_S, round_.policy.deadline_s * 2**doublings))

"""One worker's share of a round, how events change it, and the tasks of a round. Pure: a task in, a task out.

A final task never changes. An event revives an expired one, unless it shows that the upload cannot finish in time.
"""

from __future__ import annotations

import math
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType

from fedgrpc.errors import IllegalTransition, RoundClosed
from fedgrpc.rounds.events import Accepted, LossCause, Progress, Rejected, TaskEvent, TaskPhase
from fedgrpc.rounds.fields import with_fields

# Why a task is lost whose time runs out in a phase.
SLOW: Mapping[TaskPhase, LossCause] = MappingProxyType(
    {
        TaskPhase.OFFERED: LossCause.NO_SHOW,
        TaskPhase.DOWNLOADING: LossCause.SLOW_DOWNLOAD,
        TaskPhase.TRAINING: LossCause.SLOW_TRAINING,
        TaskPhase.UPLOADING: LossCause.SLOW_UPLOAD,
    }
)
# How many tasks one chunk of `Tasks` has: a change copies a chunk.
_CHUNK = 32
_Key = tuple[TaskPhase, bool]
_NOWHERE: Mapping[TaskPhase, float] = MappingProxyType({})


@dataclass(frozen=True)
class UploadPace:
    """Bytes of an update over time: how many are held since when, and two marks (seconds, bytes) before that.

    The rate is measured from the older mark. Marks move up once the newer one is a window old, so a rate covers
    one to two windows and an old stall is forgotten.
    """

    held: int
    total: int
    gained_at: float
    older: tuple[float, int]
    newer: tuple[float, int]

    @classmethod
    def begun(cls, held: int, total: int, now: float) -> UploadPace:
        """Return the pace at the first event of an upload."""
        return cls(held, total, now, (now, held), (now, held))

    def moved(self, held: int, now: float, window_s: float) -> UploadPace:
        """Return the pace with `held` bytes at `now`."""
        if held <= self.held:
            return self
        older, newer = self.older, self.newer
        if now - newer[0] >= window_s:
            older, newer = newer, (now, held)
        return replace(self, held=held, gained_at=now, older=older, newer=newer)

    def bytes_per_second(self, now: float) -> float:
        """Return the rate since the older mark."""
        since, held_then = self.older
        return (self.held - held_then) / max(1e-9, now - since)

    def cannot_finish(self, deadline_at: float, window_s: float, now: float) -> bool:
        """Return whether the missing bytes cannot arrive in the time left at the rate since the older mark."""
        since, held_then = self.older
        # Bytes come in lumps. Judge at the moment of a gain, or after a window without one.
        if now - since < window_s or self.gained_at < now < self.gained_at + window_s:
            return False
        # gained / elapsed * left < missing, without a division by zero.
        return (self.held - held_then) * (deadline_at - now) < (self.total - self.held) * (now - since)


@dataclass(frozen=True)
class Task:
    """One worker's share of the round; `slot` is its place in the canonical order of updates.

    `staleness`: versions committed since the worker got its model. `chosen`: why the worker was chosen. `begun`:
    its worker has, or may have, started on it. `carried`: it is of an earlier round. `entered`: when it first came
    to each phase. `gone`: its worker has left, or has forgotten it. `reason` is for people, `loss_cause` for code.
    """

    worker: str
    slot: int
    lease_until: float
    phase: TaskPhase = TaskPhase.OFFERED
    fraction: float = 0.0
    reason: str = ""
    loss_cause: LossCause = LossCause.NONE
    weight: float = 1.0
    staleness: int = 0
    chosen: str = ""
    begun: bool = False
    carried: bool = False
    gone: bool = False
    pace: UploadPace | None = None
    entered: Mapping[TaskPhase, float] = field(default_factory=lambda: _NOWHERE)

    @classmethod
    def offered(cls, worker: str, slot: int, lease_s: float, chosen: str, now: float) -> Task:
        """Return a new task."""
        entered = MappingProxyType({TaskPhase.OFFERED: now})
        return cls(worker, slot, now + lease_s, chosen=chosen, entered=entered)

    def entering(self, phase: TaskPhase, now: float) -> Mapping[TaskPhase, float]:
        """Return when the task first came to each phase, this one included."""
        return self.entered if phase in self.entered else MappingProxyType({**self.entered, phase: now})

    def lost(self, phase: TaskPhase, cause: LossCause, reason: str, now: float) -> Task:
        """Return this task, lost; `reason` is for people."""
        return replace(self, phase=phase, loss_cause=cause, reason=reason, entered=self.entering(phase, now))

    def timed_out(self, phase: TaskPhase, why: str, now: float) -> Task:
        """Return this open task, lost since it took too long in its present phase."""
        cause = SLOW[self.phase]
        return self.lost(phase, cause, f"{cause.label}: {why}", now)

    def expired(self, lease_s: float, now: float) -> Task:
        """Return this task, expired if its lease ran out."""
        if not self.phase.open or now < self.lease_until:
            return self
        return self.timed_out(TaskPhase.EXPIRED, f"not heard of for {lease_s:g} s", now)

    def too_slow(self, deadline_at: float | None, window_s: float, now: float) -> Task:
        """Return this task, expired if it is an upload that cannot finish before the deadline."""
        if self.pace is None or deadline_at is None or not self.pace.cannot_finish(deadline_at, window_s, now):
            return self
        due = f"{self.pace.total - self.pace.held} bytes are due in {max(0.0, deadline_at - now):.3g} s"
        return self.timed_out(TaskPhase.EXPIRED, due, now)


def apply_event(
    task: Task,
    event: TaskEvent,
    deadline_at: float | None,
    lease_s: float,
    now: float,
) -> Task:
    """Return the task after an event.

    Raises `RoundClosed` when the task is over, and `IllegalTransition` for a phase that only the aggregator
    decides.
    """
    if isinstance(event, Progress):
        return _progress(task, event, deadline_at, lease_s, now)
    if isinstance(event, Accepted):
        return _accepted(task, event, now)
    if isinstance(event, Rejected) and event.withdrawn and task.phase is TaskPhase.ACCEPTED:
        return task.lost(TaskPhase.REJECTED, LossCause.REFUSED, event.reason, now)
    if task.phase.final:
        return task
    if isinstance(event, Rejected):
        return task.lost(TaskPhase.REJECTED, LossCause.REFUSED, event.reason, now)
    return replace(task.lost(TaskPhase.FAILED, LossCause.GIVEN_BACK, event.reason, now), gone=event.gone)


def _progress(task: Task, event: Progress, deadline_at: float | None, lease_s: float, now: float) -> Task:
    if task.phase.final:
        raise RoundClosed(f"the task is {task.phase.name.lower()}: {task.reason or 'done'}")
    if not event.phase.open:
        raise IllegalTransition(f"{event.phase.name.lower()} is not for a worker to say")
    after = with_fields(
        task,
        phase=event.phase,
        entered=task.entering(event.phase, now),
        fraction=event.fraction,
        lease_until=now + lease_s,
        reason="",
        loss_cause=LossCause.NONE,
        begun=task.begun or event.phase is not TaskPhase.OFFERED,
        pace=_pace(task, event, lease_s, now),
    )
    return after.too_slow(deadline_at, lease_s, now)


def _pace(task: Task, event: Progress, window_s: float, now: float) -> UploadPace | None:
    if event.phase is not TaskPhase.UPLOADING:
        return None
    if event.bytes_held is None or event.bytes_total is None:
        return task.pace
    if task.pace is None or task.pace.total != event.bytes_total:
        return UploadPace.begun(event.bytes_held, event.bytes_total, now)
    return task.pace.moved(event.bytes_held, now, window_s)


def _accepted(task: Task, event: Accepted, now: float) -> Task:
    if task.phase is TaskPhase.ACCEPTED:
        return task
    if task.phase.final:
        raise RoundClosed(f"the task is {task.phase.name.lower()}: {task.reason}")
    phase = TaskPhase.ACCEPTED
    entered = task.entering(phase, now)
    return with_fields(
        task,
        phase=phase,
        entered=entered,
        fraction=1.0,
        reason="",
        loss_cause=LossCause.NONE,
        weight=event.weight,
    )


class Tasks(Mapping[str, Task]):
    """Tasks by token, in the order of their slots: an immutable mapping that is cheap to change.

    A round of a thousand workers sees tens of thousands of events. Tasks lie in chunks, of which a change copies
    one. Counts of tasks by phase, and the first end of a lease in each chunk, are kept up to date, so that nobody
    goes through all tasks for them.
    """

    def __init__(self, tasks: Mapping[str, Task] | None = None) -> None:
        tasks = tasks or {}
        ordered = tuple(tasks.values())
        self._slots = {token: slot for slot, token in enumerate(tasks)}
        self._chunks = tuple(ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK))
        self._counts = _counted({}, ordered, 1)
        self._first_ends = tuple(map(_first_end, self._chunks))

    @property
    def first_lease_end(self) -> float | None:
        """Time at which the first lease of an open task ends; None: no task is open."""
        first = min(self._first_ends, default=math.inf)
        return None if first == math.inf else first

    def changed(self, changes: Mapping[str, Task]) -> Tasks:
        """Return these tasks with some replaced, or added at the end."""
        if not changes.keys() <= self._slots.keys():
            return Tasks({**self, **changes})
        chunks, first_ends = list(self._chunks), list(self._first_ends)
        before = []
        # The new tasks share the slots and all other chunks with the old ones.
        for token, task in changes.items():
            number, place = divmod(self._slots[token], _CHUNK)
            chunk = chunks[number]
            old = chunk[place]
            before.append(old)
            chunks[number] = (*chunk[:place], task, *chunk[place + 1 :])
            if (end := _end(task)) <= first_ends[number]:
                first_ends[number] = end
            elif _end(old) <= first_ends[number]:
                # Only the task whose lease ended first can make the first end a later one.
                first_ends[number] = _first_end(chunks[number])
        new = Tasks.__new__(Tasks)
        new._slots, new._chunks, new._first_ends = self._slots, tuple(chunks), tuple(first_ends)
        new._counts = _counted(_counted(self._counts, before, -1), changes.values(), 1)
        return new

    def count(self, phases: Iterable[TaskPhase], stale: bool) -> int:
        """Count the tasks in one of these phases: those that are not stale, or all of them."""
        counts = self._counts
        return sum(counts.get((phase, False), 0) + (stale and counts.get((phase, True), 0)) for phase in phases)

    def __getitem__(self, token: str) -> Task:
        number, place = divmod(self._slots[token], _CHUNK)
        return self._chunks[number][place]

    def __contains__(self, token: object) -> bool:
        return token in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def values(self) -> ValuesView[Task]:
        return self._as_dict().values()

    def items(self) -> ItemsView[str, Task]:
        return self._as_dict().items()

    def _as_dict(self) -> dict[str, Task]:
        return dict(zip(self._slots, chain.from_iterable(self._chunks), strict=True))

    def __repr__(self) -> str:
        return f"Tasks({self._as_dict()!r})"


def _first_end(tasks: Iterable[Task]) -> float:
    """Return when the first lease of these tasks that are open ends; infinity: none is open."""
    return min(map(_end, tasks), default=math.inf)


def _end(task: Task) -> float:
    return task.lease_until if task.phase.open else math.inf


def _counted(counts: Mapping[_Key, int], tasks: Iterable[Task], by: int) -> dict[_Key, int]:
    changed = dict(counts)
    for task in tasks:
        key = (task.phase, task.staleness > 0)
        changed[key] = changed.get(key, 0) + by
    return changed

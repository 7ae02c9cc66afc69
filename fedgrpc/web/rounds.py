"""Rounds as the page shows them: what charts and tables keep of each, and who holds up the present one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase, TaskRecord
from fedgrpc.words import ACCEPTED, LOST, round_phase, round_scores, seconds, task_phase, warnings

_CHARTED: Final = ("accuracy", "loss")
_MOST_CHARTS: Final = 2
_OPEN: Final = (
    TaskPhase.TASK_PHASE_OFFERED,
    TaskPhase.TASK_PHASE_DOWNLOADING,
    TaskPhase.TASK_PHASE_TRAINING,
    TaskPhase.TASK_PHASE_UPLOADING,
)
# In the order of the bar: what is done, what is under way from its end backwards, what is lost.
BAR: Final = ("accepted", "uploading", "training", "downloading", "offered", "lost")


@dataclass(frozen=True)
class RoundSummary:
    """Summary of a round without its tasks, so that thousands of rounds fit into memory."""

    number: int
    phase: str
    trains: bool
    accepted: int
    asked: int
    seconds: float
    download_bytes: int
    upload_bytes: int
    scores: str
    note: str
    version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluator_metrics: Mapping[str, float] = field(default_factory=dict)


def summary_of(record: Round) -> RoundSummary:
    """Return the summary of a round with all of its tasks."""
    return RoundSummary(
        number=record.number,
        phase=round_phase(record),
        trains=record.kind != TaskKind.TASK_KIND_EVALUATE,
        accepted=sum(task.phase == ACCEPTED for task in record.tasks) + record.accepted_left_out,
        asked=len(record.tasks) + record.tasks_left_out,
        seconds=record.duration_seconds,
        download_bytes=sum(task.download_bytes for task in record.tasks),
        upload_bytes=sum(task.upload_bytes for task in record.tasks),
        scores=round_scores(record),
        note=note_of(record),
        version=record.committed_version,
        metrics=dict(record.metrics),
        evaluator_metrics=dict(record.evaluator_metrics),
    )


def note_of(record: Round) -> str:
    """Return what an operator should know of a round, in one line."""
    if record.phase == RoundPhase.ROUND_PHASE_ABANDONED:
        return record.reason
    return "; ".join(warnings(record))


def series_of(rounds: Sequence[RoundSummary]) -> dict[str, Any]:
    """Return what charts show of rounds, oldest first: columns of equal length, None where there is nothing."""
    names = [
        name for name in _CHARTED if any(name in {**each.metrics, **each.evaluator_metrics} for each in rounds)
    ]
    others = sorted({name for each in rounds for name in (*each.metrics, *each.evaluator_metrics)} - {*names})
    names = (names or others)[:_MOST_CHARTS]
    scores = {
        name: {
            "devices": [each.metrics.get(name) for each in rounds],
            "evaluators": [each.evaluator_metrics.get(name) for each in rounds],
        }
        for name in names
    }
    return {
        "rounds": [each.number for each in rounds],
        "scores": {
            name: {of: row for of, row in rows.items() if any(v is not None for v in row)}
            for name, rows in scores.items()
        },
        "download_bytes": [each.download_bytes for each in rounds],
        "upload_bytes": [each.upload_bytes for each in rounds],
        "seconds": [round(each.seconds, 3) for each in rounds],
        "abandoned": [each.number for each in rounds if each.phase == "abandoned"],
    }


@dataclass(frozen=True)
class BarSegment:
    """A part of a bar: its class, its count, where it begins and how wide it is, in percent."""

    kind: str
    count: int
    start: float
    width: float


def bar_of(record: Round) -> list[BarSegment]:
    """Return how far the tasks of a round are, as parts of one bar."""
    counts = dict.fromkeys(BAR, 0)
    for task in record.tasks:
        counts["lost" if task.phase in LOST else _kind(task)] += 1
    counts["accepted"] += record.accepted_left_out
    counts["offered"] += record.tasks_left_out - record.accepted_left_out
    return segments([(kind, count) for kind, count in counts.items() if count])


def _kind(task: TaskRecord) -> str:
    name = TaskPhase.Name(task.phase).removeprefix("TASK_PHASE_").lower()
    return name if name in BAR else "offered"


def segments(parts: Iterable[tuple[str, float]]) -> list[BarSegment]:
    """Return parts of one bar that are as wide as their numbers are large."""
    given = list(parts)
    whole = sum(count for _, count in given) or 1
    found, start = [], 0.0
    for kind, count in given:
        width = 100 * count / whole
        found.append(BarSegment(kind, int(count), round(start, 3), round(width, 3)))
        start += width
    return found


def waited_for(record: Round, most: int) -> list[TaskRecord]:
    """Return the tasks that are still open, those that are least far first; `most` of them."""
    order = {phase: place for place, phase in enumerate(_OPEN)}
    return sorted(
        (task for task in record.tasks if task.phase in order), key=lambda t: (order[t.phase], t.progress)
    )[:most]


def lost(record: Round, most: int) -> list[TaskRecord]:
    """Return the tasks that do not count; `most` of them."""
    return [task for task in record.tasks if task.phase in LOST][:most]


@dataclass(frozen=True)
class PastTask:
    """A worker's share of one round that has ended: where its time went, and why it was lost."""

    number: int
    phase: str
    reason: str
    seconds: Mapping[str, float]
    download_bytes: int
    upload_bytes: int
    metrics: Mapping[str, float]

    @property
    def whole_s(self) -> float:
        """T = T_local + T_upload + T_global + T_download."""
        return sum(self.seconds.values())

    @property
    def is_lost(self) -> bool:
        """True if the update does not count."""
        return self.phase not in ("accepted",)


def past_task(record: Round, task: TaskRecord) -> PastTask:
    """Return a task as the history of its worker shows it."""
    timings = task.timings
    parts = {part: getattr(timings, f"{part}_seconds") for part in ("download", "local", "upload", "global")}
    return PastTask(
        record.number,
        task_phase(task),
        task.reason,
        parts,
        task.download_bytes,
        task.upload_bytes,
        dict(task.metrics),
    )


def time_bar(task: PastTask, longest_s: float) -> list[BarSegment]:
    """Return where a task's time went, as parts of a bar that is full for `longest_s`."""
    shown = [(part, value) for part, value in task.seconds.items() if value > 0]
    rest = max(0.0, longest_s - task.whole_s)
    return [part for part in segments([*shown, ("rest", rest)]) if part.kind != "rest"]


def longest_past_s(tasks: Iterable[PastTask]) -> float:
    """Return the longest time among tasks, seconds."""
    return max((task.whole_s for task in tasks), default=0.0)


def longest_s(tasks: Iterable[TaskRecord]) -> float:
    """Return the same of tasks of one round."""
    return longest_past_s(past_task(Round(), task) for task in tasks)


def times_text(task: PastTask) -> str:
    """Return the parts of a task's time as text, for those who do not see the bar."""
    return ", ".join(f"T_{part} {seconds(value)}" for part, value in task.seconds.items() if value > 0)


def outlook(record: Round, task: TaskRecord, now: float) -> str:
    """Return why an open task is likely to be late, by its prediction; empty: it is not. `now`: wall time."""
    if not record.HasField("time_left"):
        return ""
    left_s = record.time_left.ToTimedelta().total_seconds()
    expected = task.prediction
    if task.phase == TaskPhase.TASK_PHASE_OFFERED:
        return "has not come for its task yet"
    parts = {part: getattr(expected, f"{part}_seconds") for part in ("download", "local", "upload")}
    elapsed_s = max(0.0, now - record.started_at.ToNanoseconds() / 1e9)
    rest_s = sum(parts.values()) - elapsed_s
    if rest_s <= left_s:
        return ""
    slowest = max(parts, key=lambda part: parts[part])
    return f"about {seconds(rest_s - left_s)} too late: T_{slowest} is likely to take {seconds(parts[slowest])}"

"""Tables of rounds, tasks and workers that fit where they are shown.

The rule: a quantity is never cut. On a narrow terminal whole columns are left out by rank, the highest first, and
the table says which. Notes have lines of their own. In a pipe or a file nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from fedgrpc.aggregation.noise import say
from fedgrpc.claims import printable
from fedgrpc.protocol.plans import local_model_plan_from_proto
from fedgrpc.protocol.records import prediction_errors
from fedgrpc.v1.aggregator_pb2 import Run, WorkerRecord, WorkerState
from fedgrpc.v1.device_pb2 import WorkerRole
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskPhase, TaskRecord
from fedgrpc.words import (
    ACCEPTED,
    LOST,
    first_failure,
    first_few,
    rate,
    round_line,
    round_phase,
    round_scores,
    run_line,
    seconds,
    size,
    task_phase,
    warnings,
)

_STYLES: Mapping[int, str] = {
    TaskPhase.TASK_PHASE_OFFERED: "dim",
    TaskPhase.TASK_PHASE_DOWNLOADING: "cyan",
    TaskPhase.TASK_PHASE_TRAINING: "yellow",
    TaskPhase.TASK_PHASE_UPLOADING: "blue",
    TaskPhase.TASK_PHASE_ACCEPTED: "green",
    TaskPhase.TASK_PHASE_REJECTED: "bold red",
    TaskPhase.TASK_PHASE_FAILED: "red",
    TaskPhase.TASK_PHASE_EXPIRED: "red",
    TaskPhase.TASK_PHASE_LATE: "magenta",
}
_ROLES: Mapping[int, str] = {
    WorkerRole.WORKER_ROLE_EVALUATOR: "evaluator",
    WorkerRole.WORKER_ROLE_AGGREGATOR: "aggregator",
}
_BAR_CELLS = 20
# A waiting poll counts as being seen; without one, silence of this length is shown.
_SILENT_S = 5.0

_GAP = 2
_NOTE = "  └ "

Cell = str | Text


@dataclass(frozen=True)
class Column:
    """A heading, the alignment of its cells, and a rank: 0 is never left out, the highest goes first."""

    heading: str
    right: bool = False
    rank: int = 0


class Table:
    """Rows of cells under columns, each with a note if it has one."""

    def __init__(self, *columns: Column) -> None:
        self._columns = columns
        self._rows: list[tuple[list[Text], str]] = []

    @property
    def row_count(self) -> int:
        """Return the number of rows, without the headings."""
        return len(self._rows)

    def add_row(self, *cells: Cell, note: str = "") -> None:
        """Add a row; missing cells at its end are empty.

        Text is never markup, and control characters become blanks.
        """
        texts = [cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells]
        missing = len(self._columns) - len(texts)
        self._rows.append(([*texts, *(Text() for _ in range(missing))], printable(note)))

    def lines(self, width: int | None) -> Iterator[Text]:
        """Yield lines of at most `width` cells where possible; None: any width."""
        widths = [
            max([len(column.heading), *(cells[index].cell_len for cells, _ in self._rows)])
            for index, column in enumerate(self._columns)
        ]
        shown = _fitting(self._columns, widths, width)
        yield self._line([Text(column.heading) for column in self._columns], shown, widths, "bold")
        for cells, note in self._rows:
            yield self._line(cells, shown, widths)
            if note:
                yield Text(_NOTE + note, style="dim")
        left_out = [self._columns[index].heading for index in range(len(widths)) if index not in shown]
        if left_out:
            yield Text(f"not shown, too narrow: {', '.join(left_out)}", style="dim")

    def _line(self, cells: Sequence[Text], shown: Sequence[int], widths: Sequence[int], style: str = "") -> Text:
        line = Text(style=style)
        for index in shown:
            fill = " " * (widths[index] - cells[index].cell_len)
            line.append_text(
                Text(fill) + cells[index] if self._columns[index].right else cells[index] + Text(fill)
            )
            line.append(" " * _GAP)
        line.rstrip()
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width if console.is_terminal else None)


def _fitting(columns: Sequence[Column], widths: Sequence[int], width: int | None) -> list[int]:
    """Return the indices of the columns to show."""
    shown = list(range(len(columns)))
    if width is None:
        return shown
    going = sorted((index for index in shown if columns[index].rank), key=lambda index: -columns[index].rank)
    while going and sum(widths[index] + _GAP for index in shown) - _GAP > width:
        shown.remove(going.pop(0))
    return shown


def task_table(record: Round) -> Table:
    """Return one row per task of a round, each with a progress bar."""
    table = Table(
        *(Column("worker"), Column("device", rank=3), Column("task"), Column("progress", rank=1)),
        *(Column("examples", True, 4), Column("down", True, 5), Column("up", True, 6)),
    )
    for task in record.tasks:
        table.add_row(
            task.worker,
            task.device_class,
            Text(task_phase(task), style=_STYLES.get(task.phase, "")),
            _bar(task),
            str(task.example_count or ""),
            size(task.download_bytes) if task.download_bytes else "",
            size(task.upload_bytes) if task.upload_bytes else "",
            note=task.reason or _remark(task),
        )
    if record.tasks_left_out:
        table.add_row(f"and {record.tasks_left_out} more")
    return table


def _bar(task: TaskRecord) -> Text:
    share = 1.0 if task.phase == TaskPhase.TASK_PHASE_ACCEPTED else min(1.0, max(0.0, task.progress))
    done = round(share * _BAR_CELLS)
    return Text.assemble(("━" * done, _STYLES.get(task.phase, "white")), ("━" * (_BAR_CELLS - done), "grey23"))


def rounds_table(rounds: Sequence[Round]) -> Table:
    """Return one row per round, oldest first."""
    table = Table(
        *(Column("round", True), Column("updates", True), Column("time", True, 1)),
        *(Column("down", True, 3), Column("up", True, 4), Column("phase"), Column("scores", rank=2)),
    )
    for record in rounds:
        accepted = sum(task.phase == TaskPhase.TASK_PHASE_ACCEPTED for task in record.tasks)
        table.add_row(
            str(record.number),
            f"{accepted}/{len(record.tasks)}",
            seconds(record.duration_seconds),
            size(sum(task.download_bytes for task in record.tasks)),
            size(sum(task.upload_bytes for task in record.tasks)),
            round_phase(record),
            round_scores(record),
            note=_note(record),
        )
    return table


def _note(record: Round) -> str:
    if record.phase == RoundPhase.ROUND_PHASE_ABANDONED:
        return "; ".join(filter(None, (record.reason, first_failure(record))))
    lost = [f"{task.worker}: {task.reason}" for task in record.tasks if task.phase in LOST]
    idle = [f"{task.worker}: training changed nothing" for task in record.tasks if task.unchanged]
    return "; ".join([*warnings(record), *first_few(lost + idle)])


def workers_table(workers: Sequence[WorkerRecord], run: str = "") -> Table:
    """Return one row per worker, with its new examples where some worker tells of them.

    A worker that takes no task of `run` has the reason as its note.
    """
    told = any(record.HasField("new_examples") for record in workers)
    table = Table(
        *(Column("worker"), Column("role", rank=4), Column("device", rank=3), Column("state")),
        *(
            Column("cores", True, 6),
            Column("memory", True, 5),
            Column("seen", True, 1),
            Column("accepted", rank=2),
        ),
        *((Column("new examples", True, 1),) if told else ()),
    )
    for record in workers:
        device = record.device
        table.add_row(
            record.worker,
            _ROLES.get(record.role, "trainer"),
            device.device_class or device.cpu_model or "",
            _state(record),
            str(device.cpu_cores or ""),
            size(device.memory_bytes) if device.memory_bytes else "",
            f"{seconds(record.last_seen_ago.ToTimedelta().total_seconds())} ago",
            f"{record.rounds_accepted}/{record.rounds_selected}",
            *((str(record.new_examples) if record.HasField("new_examples") else "",) if told else ()),
            note=f"takes no tasks of {run}: {record.refusals[run]}" if run in record.refusals else "",
        )
    return table


def links_table(workers: Sequence[WorkerRecord]) -> Table:
    """Return one row per worker: the speed of its link, and the recipes of its models and updates."""
    table = Table(
        *(Column("worker"), Column("up", True, 1), Column("updates as"), Column("down", True, 2)),
        *(Column("models as"), Column("differences as", rank=3)),
    )
    for record in workers:
        up, down = map(rate, (record.uplink_bytes_per_second, record.downlink_bytes_per_second))
        recipes = (record.download_recipe, record.difference_recipe)
        table.add_row(record.worker, up, record.upload_recipe, down, *recipes)
    return table


def predictions_table(rounds: Sequence[Round]) -> Table:
    """Compare predicted and measured costs of accepted tasks in the last round that has predictions."""
    table = Table(
        *(Column("worker"), Column("T_local", True), Column("T_upload", True), Column("T_download", True)),
        *(Column("memory", True, 1), Column("tensors", True, 2)),
    )
    for record in reversed(rounds):
        tasks = [task for task in record.tasks if task.HasField("prediction") and task.phase == ACCEPTED]
        for task in tasks:
            errors = prediction_errors(task)
            predicted, seen = task.prediction, task.timings
            times = (
                _beside(
                    seconds(getattr(seen, f"{part}_seconds")),
                    getattr(predicted, f"{part}_seconds"),
                    errors.get(part),
                )
                for part in ("local", "upload", "download")
            )
            memory = _beside(size(task.peak_memory_bytes), predicted.peak_memory_bytes, errors.get("memory"), size)
            tensors = size(task.tensor_bytes) if task.tensor_bytes else ""
            table.add_row(
                task.worker, *times, memory, tensors, note=local_model_plan_from_proto(task.local_model).to_line()
            )
        if tasks:
            return table
    return table


def _remark(task: TaskRecord) -> str:
    """Return what an operator should know of an accepted update."""
    if task.unchanged:
        return "training changed nothing"
    return (
        f"its number format adds noise: {say(task.noise_ratio):.2g} of its weight" if task.noise_ratio > 1 else ""
    )


def _beside(measured: str, expected: float, error: float | None, shown: Callable[[float], str] = seconds) -> str:
    """Format `1.00 s→1.20 s -17%`: predicted, measured, relative error."""
    return measured if error is None else f"{shown(expected)}→{measured} {error:+.0%}"


def _state(record: WorkerRecord) -> str:
    state = WorkerState.Name(record.state).removeprefix("WORKER_STATE_").lower()
    if record.state == WorkerState.WORKER_STATE_IDLE:
        # The lease holds, but the worker is not polling: it hangs, or its link is down.
        silent = record.last_seen_ago.ToTimedelta().total_seconds() >= _SILENT_S
        return "silent" if silent else state
    if record.state != WorkerState.WORKER_STATE_BUSY or not record.task_phase:
        return state
    phase = TaskPhase.Name(record.task_phase).removeprefix("TASK_PHASE_").lower()
    return f"{phase} {record.progress:.0%}"


def live_view(run: Run, record: Round, scored: str = "") -> RenderableType:
    """Return what `watch` shows: the run, the round, its tasks, and the newest scores."""
    lines = [Text(run_line(run), style="bold"), Text(round_line(record)), *([Text(scored)] if scored else [])]
    return Group(*lines, Text(), task_table(record))

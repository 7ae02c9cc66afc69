"""What a run looks like on a terminal: protocol messages in, rich tables and lines of text out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fedgrpc.claims import printable
from fedgrpc.cli.table import Column, Table
from fedgrpc.metrics import prediction_errors
from fedgrpc.protocol.plans import local_model_plan_from_proto
from fedgrpc.v1.aggregator_pb2 import Run, RunPhase, WorkerRecord, WorkerState
from fedgrpc.v1.device_pb2 import WorkerRole
from fedgrpc.v1.round_pb2 import Jump, ModelVersion, Round, RoundPhase, TaskKind, TaskPhase, TaskRecord

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
# Of a task whose update does not count, and of one that is over either way.
LOST: frozenset[int] = frozenset(
    {
        TaskPhase.TASK_PHASE_REJECTED,
        TaskPhase.TASK_PHASE_FAILED,
        TaskPhase.TASK_PHASE_EXPIRED,
        TaskPhase.TASK_PHASE_LATE,
    }
)
SETTLED: frozenset[int] = LOST | {TaskPhase.TASK_PHASE_ACCEPTED}
_ROLES: Mapping[int, str] = {
    WorkerRole.WORKER_ROLE_EVALUATOR: "evaluator",
    WorkerRole.WORKER_ROLE_AGGREGATOR: "aggregator",
}
_JUMPS: Mapping[int, str] = {
    Jump.JUMP_NORM: "the model has become far larger",
    Jump.JUMP_SCORES: "its scores are far worse than the best",
}
_ACCEPTED = TaskPhase.TASK_PHASE_ACCEPTED
# Wider than any line: into a pipe nothing is cut or broken.
_PIPE_COLUMNS = 10_000
_BAR_CELLS = 20
# A worker that holds a poll was heard of just now.
_SILENT_S = 5.0
_SHOWN_AT_MOST = 20
_DONE = (RoundPhase.ROUND_PHASE_COMMITTED, RoundPhase.ROUND_PHASE_ABANDONED)


def piped_console() -> Console:
    """A terminal as wide as it is; into a pipe or a file, lines as long as they are."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_COLUMNS)


def print_table(console: Console, table: RenderableType) -> None:
    """A table; in a pipe or a file without the blanks that fill its lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def size(count: float) -> str:
    """Bytes as 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def rate(bytes_per_second: float) -> str:
    """A rate as 1.2 Mbit/s; 0 is one that nobody knows."""
    if not bytes_per_second:
        return "unknown"
    bits = 8 * bytes_per_second
    for unit in ("bit", "kbit", "Mbit", "Gbit"):
        if bits < 1000 or unit == "Gbit":
            return f"{bits:.3g} {unit}/s"
        bits /= 1000
    raise AssertionError


def seconds(value: float) -> str:
    """Seconds with as many digits as they deserve."""
    if 0 < value < 0.1:
        return f"{1000 * value:.0f} ms" if value >= 0.001 else "<1 ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def run_phase(run: Run) -> str:
    """`running`, `finished`, ..."""
    return RunPhase.Name(run.phase).removeprefix("RUN_PHASE_").lower()


def round_phase(record: Round) -> str:
    """`reporting`, `committed`, ...; a round that only scores the last version is `scored`."""
    if record.kind == TaskKind.TASK_KIND_EVALUATE and record.phase == RoundPhase.ROUND_PHASE_COMMITTED:
        return "scored"
    return RoundPhase.Name(record.phase).removeprefix("ROUND_PHASE_").lower()


def task_phase(task: TaskRecord) -> str:
    """`training`, `accepted`, ...; a task that only scores is `scoring` while it does."""
    if task.phase == TaskPhase.TASK_PHASE_TRAINING and task.kind == TaskKind.TASK_KIND_EVALUATE:
        return "scoring"
    return TaskPhase.Name(task.phase).removeprefix("TASK_PHASE_").lower()


def scores(metrics: Mapping[str, float], names: Iterable[str] = ("accuracy", "loss")) -> str:
    """`accuracy 0.912, loss 0.31`; the well-known ones, or else the first two."""
    chosen = [name for name in names if name in metrics] or sorted(metrics)[:2]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in chosen)


def run_line(run: Run) -> str:
    """One line about the run."""
    committed = run.last.trained_rounds if run.HasField("last") else 0
    planned = f" of {run.total_rounds}" if run.total_rounds else ""
    parts = [f"run {run.name}", run_phase(run), f"{committed}{planned} rounds committed"]
    parts.append(f"model version {run.model_version}" if run.HasField("last") else "no model yet")
    if run.HasField("best") and run.best.version != run.last.version:
        parts.append(f"best {version_text(run.best)}")
    reason = run.reason or run.paused_reason
    return printable(" · ".join(parts) + (f" ({reason})" if reason else ""))


def version_text(version: ModelVersion) -> str:
    """`version 7: accuracy 0.93`; only the number of one that is not scored."""
    found = scores(version.evaluator_metrics or version.metrics)
    return f"version {version.version}" + (f": {found}" if found else "")


def round_line(record: Round) -> str:
    """One line about a round: where it stands, who is in, what came out."""
    accepted = sum(task.phase == _ACCEPTED for task in record.tasks) + record.accepted_left_out
    parts = [f"round {record.number}", round_phase(record)]
    if record.tasks:
        parts.append(f"{accepted} of {len(record.tasks) + record.tasks_left_out} updates")
    if record.HasField("time_left"):
        parts.append(f"{record.time_left.ToTimedelta().total_seconds():.0f} s left")
    if record.phase in _DONE:
        parts.append(seconds(record.duration_seconds))
    if record.phase == RoundPhase.ROUND_PHASE_ABANDONED:
        parts += filter(None, (record.reason, first_failure(record)))
    missing = _first([f"{task.worker} {task_phase(task)}" for task in record.tasks if task.phase in LOST])
    found = round_scores(record)
    return printable(" · ".join([*parts, *warnings(record), *missing, *([found] if found else [])]))


def round_scores(record: Round) -> str:
    """Scores of the version that a round wrote: by evaluators where there are any, else by its workers."""
    if record.evaluator_metrics or not record.metrics_of_sub_models:
        return scores(record.evaluator_metrics or record.metrics)
    return f"{scores(record.metrics)} (of sub-models)" if record.metrics else ""


def task_table(record: Round) -> Table:
    """Who does what in a round, with a bar of progress for each."""
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
            note=task.reason or ("training changed nothing" if task.unchanged else ""),
        )
    if record.tasks_left_out:
        table.add_row(f"and {record.tasks_left_out} more")
    return table


def _bar(task: TaskRecord) -> Text:
    share = 1.0 if task.phase == TaskPhase.TASK_PHASE_ACCEPTED else min(1.0, max(0.0, task.progress))
    done = round(share * _BAR_CELLS)
    return Text.assemble(("━" * done, _STYLES.get(task.phase, "white")), ("━" * (_BAR_CELLS - done), "grey23"))


def rounds_table(rounds: Sequence[Round]) -> Table:
    """One row per round, oldest first."""
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
    return "; ".join([*warnings(record), *_first(lost + idle)])


def warnings(record: Round) -> list[str]:
    """What an operator should look at in a committed round."""
    found = []
    if record.HasField("rolled_back_to"):
        found.append(record.reason)
    if record.scores_not_finite:
        found.append(f"not finite: {', '.join(record.scores_not_finite[:3])}")
    if record.HasField("dominance"):
        found.append(f"{record.dominance.worker} is {record.dominance.share:.0%} of the mean")
    if record.jump:
        found.append(_JUMPS.get(record.jump, ""))
    return found


def first_failure(record: Round) -> str:
    """The reason of the first task that failed or was rejected: most likely that of all the others."""
    failed = (TaskPhase.TASK_PHASE_FAILED, TaskPhase.TASK_PHASE_REJECTED)
    reasons = [f"{task.worker}: {task.reason}" for task in record.tasks if task.phase in failed and task.reason]
    return reasons[0] if reasons else ""


def by_name(name: str) -> tuple[object, ...]:
    """A sorting key by which pi-2 comes before pi-10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name))


def _first(items: list[str]) -> list[str]:
    """As many as one reads."""
    more = len(items) - _SHOWN_AT_MOST
    return [*items[:_SHOWN_AT_MOST], f"and {more} more"] if more > 1 else items


def workers_table(workers: Sequence[WorkerRecord]) -> Table:
    """One row per worker."""
    table = Table(
        *(Column("worker"), Column("role", rank=4), Column("device", rank=3), Column("state")),
        *(
            Column("cores", True, 6),
            Column("memory", True, 5),
            Column("seen", True, 1),
            Column("accepted", rank=2),
        ),
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
        )
    return table


def links_table(workers: Sequence[WorkerRecord]) -> Table:
    """One row per worker: its link, and how its models and updates travel over it."""
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
    """Of the last of these rounds that has any: each accepted task's cost predicted and measured."""
    table = Table(
        *(Column("worker"), Column("T_local", True), Column("T_upload", True), Column("T_download", True)),
        *(Column("memory", True, 1), Column("tensors", True, 2)),
    )
    for record in reversed(rounds):
        tasks = [task for task in record.tasks if task.HasField("prediction") and task.phase == _ACCEPTED]
        for task in tasks:
            errors = prediction_errors(task)
            its, seen = task.prediction, task.timings
            times = (
                _beside(
                    seconds(getattr(seen, f"{part}_seconds")), getattr(its, f"{part}_seconds"), errors.get(part)
                )
                for part in ("local", "upload", "download")
            )
            memory = _beside(size(task.peak_memory_bytes), its.peak_memory_bytes, errors.get("memory"), size)
            tensors = size(task.tensor_bytes) if task.tensor_bytes else ""
            table.add_row(
                task.worker, *times, memory, tensors, note=local_model_plan_from_proto(task.local_model).to_line()
            )
        if tasks:
            return table
    return table


def _beside(measured: str, expected: float, error: float | None, shown: Callable[[float], str] = seconds) -> str:
    """`1.00 s→1.20 s -17%`: as predicted, as measured, and how far that was off."""
    return measured if error is None else f"{shown(expected)}→{measured} {error:+.0%}"


def _state(record: WorkerRecord) -> str:
    state = WorkerState.Name(record.state).removeprefix("WORKER_STATE_").lower()
    if record.state == WorkerState.WORKER_STATE_IDLE:
        # Its lease has not run out, but it does not wait for a task: it hangs, or its link is gone.
        silent = record.last_seen_ago.ToTimedelta().total_seconds() >= _SILENT_S
        return "silent" if silent else state
    if record.state != WorkerState.WORKER_STATE_BUSY or not record.task_phase:
        return state
    phase = TaskPhase.Name(record.task_phase).removeprefix("TASK_PHASE_").lower()
    return f"{phase} {record.progress:.0%}"


def scored_line(rounds: Sequence[Round]) -> str:
    """Scores of the newest version that has any: they come with the updates of the round after."""
    for record in sorted(rounds, key=lambda record: -record.number):
        if found := round_scores(record):
            return f"version {record.committed_version or record.base_version}: {found}"
    return ""


def live_view(run: Run, record: Round, scored: str = "") -> RenderableType:
    """What `watch` shows: the run, the round, its tasks, and the newest scores."""
    lines = [Text(run_line(run), style="bold"), Text(round_line(record)), *([Text(scored)] if scored else [])]
    return Group(*lines, Text(), task_table(record))

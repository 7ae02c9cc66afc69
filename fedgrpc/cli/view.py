"""A run and its rounds as lines of text, and quantities as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, RenderableType

from fedgrpc.claims import printable
from fedgrpc.v1.aggregator_pb2 import Run, RunPhase
from fedgrpc.v1.round_pb2 import Jump, ModelVersion, Round, RoundPhase, TaskKind, TaskPhase, TaskRecord

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
_JUMPS: Mapping[int, str] = {
    Jump.JUMP_NORM: "the model has become far larger",
    Jump.JUMP_SCORES: "its scores are far worse than the best",
}
ACCEPTED = TaskPhase.TASK_PHASE_ACCEPTED
# Wider than any line: into a pipe nothing is cut or broken.
_PIPE_COLUMNS = 10_000
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
    accepted = sum(task.phase == ACCEPTED for task in record.tasks) + record.accepted_left_out
    parts = [f"round {record.number}", round_phase(record)]
    if record.tasks:
        parts.append(f"{accepted} of {len(record.tasks) + record.tasks_left_out} updates")
    if record.HasField("time_left"):
        parts.append(f"{record.time_left.ToTimedelta().total_seconds():.0f} s left")
    if record.phase in _DONE:
        parts.append(seconds(record.duration_seconds))
    if record.phase == RoundPhase.ROUND_PHASE_ABANDONED:
        parts += filter(None, (record.reason, first_failure(record)))
    missing = first_few([f"{task.worker} {task_phase(task)}" for task in record.tasks if task.phase in LOST])
    found = round_scores(record)
    return printable(" · ".join([*parts, *warnings(record), *missing, *([found] if found else [])]))


def round_scores(record: Round) -> str:
    """Scores of the version that a round wrote: by evaluators where there are any, else by its workers."""
    if record.evaluator_metrics or not record.metrics_of_sub_models:
        return scores(record.evaluator_metrics or record.metrics)
    return f"{scores(record.metrics)} (of sub-models)" if record.metrics else ""


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


def first_few(items: list[str]) -> list[str]:
    """As many as one reads."""
    more = len(items) - _SHOWN_AT_MOST
    return [*items[:_SHOWN_AT_MOST], f"and {more} more"] if more > 1 else items


def scored_line(rounds: Sequence[Round]) -> str:
    """Scores of the newest version that has any: they come with the updates of the round after."""
    for record in sorted(rounds, key=lambda record: -record.number):
        if found := round_scores(record):
            return f"version {record.committed_version or record.base_version}: {found}"
    return ""

"""A run, its rounds and quantities in the words that people read: for the command line and the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedgrpc.claims import printable
from fedgrpc.v1.aggregator_pb2 import IngestProcesses, Run, RunPhase
from fedgrpc.v1.round_pb2 import Jump, ModelVersion, Round, RoundPhase, TaskKind, TaskPhase, TaskRecord

# Phases of tasks whose update does not count, and of tasks that have ended.
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
_FAILED = (TaskPhase.TASK_PHASE_FAILED, TaskPhase.TASK_PHASE_REJECTED)
# Phases of a run that has ended.
ENDED: frozenset[int] = frozenset({RunPhase.RUN_PHASE_FINISHED, RunPhase.RUN_PHASE_STOPPED})
_SHOWN_AT_MOST = 20
_DONE = (RoundPhase.ROUND_PHASE_COMMITTED, RoundPhase.ROUND_PHASE_ABANDONED)


def size(count: float) -> str:
    """Format bytes, as in 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def rate(bytes_per_second: float) -> str:
    """Format a rate, as in 1.2 Mbit/s; 0 is unknown."""
    if not bytes_per_second:
        return "unknown"
    bits = 8 * bytes_per_second
    for unit in ("bit", "kbit", "Mbit", "Gbit"):
        if bits < 1000 or unit == "Gbit":
            return f"{bits:.3g} {unit}/s"
        bits /= 1000
    raise AssertionError


def seconds(value: float) -> str:
    """Format seconds with two or three significant digits."""
    if 0 < value < 0.1:
        return f"{1000 * value:.0f} ms" if value >= 0.001 else "<1 ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def run_phase(run: Run) -> str:
    """Return `running`, `finished`, ..."""
    return RunPhase.Name(run.phase).removeprefix("RUN_PHASE_").lower()


def round_phase(record: Round) -> str:
    """Return `reporting`, `committed`, ...; a committed evaluation round is `scored`."""
    if record.kind == TaskKind.TASK_KIND_EVALUATE and record.phase == RoundPhase.ROUND_PHASE_COMMITTED:
        return "scored"
    return RoundPhase.Name(record.phase).removeprefix("ROUND_PHASE_").lower()


def task_phase(task: TaskRecord) -> str:
    """Return `training`, `accepted`, ...; a running evaluation task is `scoring`."""
    if task.phase == TaskPhase.TASK_PHASE_TRAINING and task.kind == TaskKind.TASK_KIND_EVALUATE:
        return "scoring"
    return TaskPhase.Name(task.phase).removeprefix("TASK_PHASE_").lower()


def scores(metrics: Mapping[str, float], names: Iterable[str] = ("accuracy", "loss")) -> str:
    """Format scores, as in `accuracy 0.912, loss 0.31`: those of `names`, or else the first two."""
    chosen = [name for name in names if name in metrics] or sorted(metrics)[:2]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in chosen)


def run_line(run: Run) -> str:
    """Describe the run in one line."""
    committed = run.last.trained_rounds if run.HasField("last") else 0
    planned = f" of {run.total_rounds}" if run.total_rounds else ""
    parts = [f"run {run.name}", run_phase(run), f"{committed}{planned} rounds committed"]
    parts.append(f"model version {run.model_version}" if run.HasField("last") else "no model yet")
    if run.HasField("best") and run.best.version != run.last.version:
        parts.append(f"best {version_text(run.best)}")
    reason = run.reason or run.paused_reason
    return printable(" · ".join(parts) + (f" ({reason})" if reason else ""))


def ingest_line(ingest: IngestProcesses) -> str:
    """Describe the ingest processes of an aggregator in one line."""
    took = f"{ingest.restarts} restarts, {size(ingest.memory_bytes)} of memory"
    return f"ingest: {ingest.serving} of {ingest.wanted} processes, {took}"


def version_text(version: ModelVersion) -> str:
    """Return `version 7: accuracy 0.93`, or `version 7` where it has no scores."""
    found = scores(version.evaluator_metrics or version.metrics)
    return f"version {version.version}" + (f": {found}" if found else "")


def round_line(record: Round) -> str:
    """Describe a round in one line: phase, updates, time, lost tasks and scores."""
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
    missing = first_few([_lost(task) for task in record.tasks if task.phase in LOST])
    found = round_scores(record)
    return printable(" · ".join([*parts, *warnings(record), *missing, *([found] if found else [])]))


def _lost(task: TaskRecord) -> str:
    """Return how a task was lost, with the reason where a device or a check has one."""
    told = task.reason if task.phase in _FAILED else ""
    return f"{task.worker} {task_phase(task)}" + (f": {told}" if told else "")


def round_scores(record: Round) -> str:
    """Return the scores of the version that a round wrote: by evaluators, else by its workers."""
    if record.evaluator_metrics or not record.metrics_of_sub_models:
        return scores(record.evaluator_metrics or record.metrics)
    return f"{scores(record.metrics)} (of sub-models)" if record.metrics else ""


def warnings(record: Round) -> list[str]:
    """List what an operator should look at in a committed round."""
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
    """Return the reason of the first task that failed or was rejected, most likely the reason of all."""
    reasons = [f"{task.worker}: {task.reason}" for task in record.tasks if task.phase in _FAILED and task.reason]
    return reasons[0] if reasons else ""


def first_few(items: list[str]) -> list[str]:
    """Return the first items, and the number of the others."""
    more = len(items) - _SHOWN_AT_MOST
    return [*items[:_SHOWN_AT_MOST], f"and {more} more"] if more > 1 else items


def scored_line(rounds: Sequence[Round]) -> str:
    """Return the scores of the newest scored version; scores come with the updates of the next round."""
    for record in sorted(rounds, key=lambda record: -record.number):
        if found := round_scores(record):
            return f"version {record.committed_version or record.base_version}: {found}"
    return ""

"""Results of the demo: numbers from the rounds' records, as tables, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fedgrpc.cli.as_json import plain
from fedgrpc.cli.demo.processes import Scores
from fedgrpc.plots import COLOURS, TEXT_PT, new_figure, save
from fedgrpc.v1.aggregator_pb2 import Run
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase, TaskRecord
from fedgrpc.v1.tensor_pb2 import Dtype
from fedgrpc.words import size

_ITEM_BYTES = {
    **{Dtype.DTYPE_FLOAT64: 8, Dtype.DTYPE_INT64: 8, Dtype.DTYPE_FLOAT32: 4, Dtype.DTYPE_INT32: 4},
    **{Dtype.DTYPE_FLOAT16: 2, Dtype.DTYPE_BFLOAT16: 2, Dtype.DTYPE_INT16: 2},
    **{Dtype.DTYPE_INT8: 1, Dtype.DTYPE_UINT8: 1, Dtype.DTYPE_BOOL: 1},
}


@dataclass(frozen=True)
class WorkerSummary:
    """One worker over all training rounds; times are means over its accepted tasks, seconds."""

    worker: str
    device_class: str
    accepted: int
    missed: int
    example_count: int
    local_s: float
    upload_s: float
    global_s: float
    download_s: float
    peak_memory_bytes: int
    tensor_bytes: int = 0

    @property
    def total_s(self) -> float:
        """T = T_local + T_upload + T_global + T_download."""
        return self.local_s + self.upload_s + self.global_s + self.download_s


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of the training rounds, and what plain float32 would have been."""

    download_bytes: int
    upload_bytes: int
    plain_download_bytes: int
    plain_upload_bytes: int


@dataclass(frozen=True)
class DemoReport:
    """Results of the whole demo."""

    run: Run
    rounds: Sequence[Round]
    training_rounds: Sequence[Round]
    workers: Sequence[WorkerSummary]
    traffic: Traffic
    pooled: Sequence[Scores]
    wall_s: float

    @property
    def metric(self) -> str:
        """Return the score to show: accuracy, else the task's first metric, else the loss."""
        scored = [_scored(record) for record in self.training_rounds]
        names = {name for scores in [*scored, *self.pooled] for name in scores}
        return "accuracy" if "accuracy" in names else min(names - {"loss"}, default="loss")

    @property
    def scores(self) -> list[float]:
        """Return the score of each committed training round on the held-out data; NaN without one."""
        return [_scored(record).get(self.metric, math.nan) for record in self.training_rounds]

    @property
    def pooled_scores(self) -> list[float]:
        """Return the scores of the same model trained on the pooled data, after as many epochs."""
        return [scores.get(self.metric, math.nan) for scores in self.pooled]

    def as_json(self) -> dict[str, Any]:
        """Return everything for `rounds.json`; missing scores are NaN, which becomes null."""
        return {
            "metric": self.metric,
            "run": plain(self.run),
            "scores": self.scores,
            "pooled_scores": self.pooled_scores,
            "traffic": asdict(self.traffic),
            "workers": [{**asdict(worker), "total_s": worker.total_s} for worker in self.workers],
            "wall_s": self.wall_s,
            "rounds": [plain(record) for record in self.rounds],
        }


def _scored(record: Round) -> Mapping[str, float]:
    """Return the scores by the evaluator or, while it still starts, by the workers."""
    return record.evaluator_metrics or record.metrics


def training_rounds(rounds: Sequence[Round]) -> list[Round]:
    """Return the committed training rounds."""
    training = [record for record in rounds if record.kind == TaskKind.TASK_KIND_TRAIN]
    return [record for record in training if record.phase == RoundPhase.ROUND_PHASE_COMMITTED]


def make_report(run: Run, rounds: Sequence[Round], pooled: Sequence[Scores], wall_s: float) -> DemoReport:
    """Sum up the rounds' records."""
    training = [record for record in rounds if record.kind == TaskKind.TASK_KIND_TRAIN]
    names = sorted({task.worker for record in training for task in record.tasks})
    workers = [_summary([t for record in training for t in record.tasks if t.worker == name]) for name in names]
    return DemoReport(run, rounds, training_rounds(rounds), workers, _traffic(run, training), pooled, wall_s)


def _summary(tasks: Sequence[TaskRecord]) -> WorkerSummary:
    accepted = [task for task in tasks if task.phase == TaskPhase.TASK_PHASE_ACCEPTED]
    count = max(1, len(accepted))
    times = {
        name: sum(getattr(task.timings, f"{name}_seconds") for task in accepted) / count
        for name in ("local", "upload", "global", "download")
    }
    return WorkerSummary(
        worker=tasks[0].worker,
        device_class=tasks[0].device_class,
        accepted=len(accepted),
        missed=len(tasks) - len(accepted),
        example_count=max((task.example_count for task in accepted), default=0),
        local_s=times["local"],
        upload_s=times["upload"],
        global_s=times["global"],
        download_s=times["download"],
        peak_memory_bytes=max((task.peak_memory_bytes for task in accepted), default=0),
        tensor_bytes=max((task.tensor_bytes for task in accepted), default=0),
    )


def _traffic(run: Run, training: Sequence[Round]) -> Traffic:
    model_bytes = sum(_ITEM_BYTES[spec.dtype] * math.prod(spec.shape) for spec in run.layout)
    tasks = [task for record in training for task in record.tasks]
    return Traffic(
        download_bytes=sum(task.download_bytes for task in tasks),
        upload_bytes=sum(task.upload_bytes for task in tasks),
        plain_download_bytes=model_bytes * sum(task.download_bytes > 0 for task in tasks),
        plain_upload_bytes=model_bytes * sum(task.upload_bytes > 0 for task in tasks),
    )


def scores_table(report: DemoReport) -> Table:
    """Return federated and pooled scores side by side, round by round."""
    table = _table("round", "updates", report.metric, "pooled, same epochs", "without")
    for index, record in enumerate(report.training_rounds):
        accepted = [task for task in record.tasks if task.phase == TaskPhase.TASK_PHASE_ACCEPTED]
        missing = [task.worker for task in record.tasks if task.phase != TaskPhase.TASK_PHASE_ACCEPTED]
        pooled = report.pooled_scores
        table.add_row(
            str(record.number),
            f"{len(accepted)}/{len(record.tasks)}",
            _shown(report.scores[index]),
            _shown(pooled[index]) if index < len(pooled) else "",
            ", ".join(missing),
        )
    return table


def workers_table(report: DemoReport) -> Table:
    """T = T_local + T_upload + T_global + T_download for each worker, means over its rounds."""
    table = _table("worker", "rounds", "missed", "examples", "T_local", "T_upload", "T_global", "T_download", "T")
    for worker in report.workers:
        times = (worker.local_s, worker.upload_s, worker.global_s, worker.download_s, worker.total_s)
        counts = (worker.accepted, worker.missed, worker.example_count)
        table.add_row(worker.worker, *map(str, counts), *(f"{time_s:.3f} s" for time_s in times))
    return table


def traffic_line(traffic: Traffic) -> str:
    """Describe the bytes down and up, and their share of plain float32."""
    down = _share(traffic.download_bytes, traffic.plain_download_bytes)
    up = _share(traffic.upload_bytes, traffic.plain_upload_bytes)
    return f"down {size(traffic.download_bytes)} ({down}), up {size(traffic.upload_bytes)} ({up})"


def _share(count: int, plain: int) -> str:
    return f"{count / plain:.1%} of plain float32's {size(plain)}" if plain else "nothing to compare"


def verdict_line(report: DemoReport) -> str:
    """Compare the last scores in one line."""
    ours, pooled = (scores[-1] if scores else math.nan for scores in (report.scores, report.pooled_scores))
    if math.isnan(ours) or math.isnan(pooled):
        return "no scores"
    said = f"{report.metric} {_shown(ours)} federated, {_shown(pooled)} pooled"
    return f"{said}: {100 * (ours - pooled):+.1f} points" if report.metric == "accuracy" else said


def _shown(score: float) -> str:
    """Format a score with three decimals or three significant digits; "" for NaN."""
    if math.isnan(score):
        return ""
    return f"{score:.3f}" if abs(score) < 10 and (abs(score) >= 0.1 or not score) else f"{score:.3g}"


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        left = heading in ("worker", "without")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table


_PARTS = (("local_s", "T_local"), ("upload_s", "T_upload"), ("global_s", "T_global"), ("download_s", "T_download"))


def plot_rounds(report: DemoReport, path: Path) -> None:
    """Plot scores over the rounds, and the time of each worker by its parts."""
    figure, (scores, times) = new_figure(2, 11, 4.4)
    numbers = range(1, len(report.scores) + 1)
    scores.plot(numbers, report.scores, marker="o", label="federated")
    pooled = report.pooled_scores
    scores.plot(range(1, len(pooled) + 1), pooled, linestyle="--", color="#555555", label="pooled, same epochs")
    for number, record in enumerate(report.training_rounds, start=1):
        accepted = sum(task.phase == TaskPhase.TASK_PHASE_ACCEPTED for task in record.tasks)
        if accepted < len(record.tasks):
            at = (number, report.scores[number - 1])
            # To the right of the line's rise, and below it.
            scores.annotate(
                f"{accepted} of {len(record.tasks)}",
                at,
                (8, -14),
                textcoords="offset points",
                fontsize=TEXT_PT,
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "#555555"},
            )
    scores.set(xlabel="round", ylabel=f"{report.metric} on held-out data", title=report.metric.capitalize())
    scores.legend(loc="lower right", frameon=False, fontsize=TEXT_PT)

    names = [worker.worker for worker in report.workers]
    left = [0.0] * len(names)
    for (attribute, label), colour in zip(_PARTS, COLOURS, strict=False):
        values = [getattr(worker, attribute) for worker in report.workers]
        times.barh(names, values, left=left, label=label, color=colour)
        left = [start + value for start, value in zip(left, values, strict=True)]
    times.invert_yaxis()
    times.set(xlabel="seconds a round, mean", title="Where the time goes")
    times.grid(visible=False, axis="y")
    times.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=4, frameon=False, fontsize=TEXT_PT)
    save(figure, path)

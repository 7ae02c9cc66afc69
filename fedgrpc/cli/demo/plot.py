"""`rounds.png`: scores over the rounds, and where each worker's time went."""

from __future__ import annotations

from pathlib import Path

from fedgrpc.cli.demo.report import Report
from fedgrpc.v1.round_pb2 import TaskPhase

_PARTS = (("local_s", "T_local"), ("upload_s", "T_upload"), ("global_s", "T_global"), ("download_s", "T_download"))


def plot_rounds(report: Report, path: Path) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (scores, times) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    numbers = range(1, len(report.scores) + 1)
    scores.plot(numbers, report.scores, marker="o", label="federated")
    pooled = report.pooled_scores
    scores.plot(range(1, len(pooled) + 1), pooled, linestyle="--", color="gray", label="pooled, same epochs")
    for number, record in enumerate(report.training_rounds, start=1):
        accepted = sum(task.phase == TaskPhase.TASK_PHASE_ACCEPTED for task in record.tasks)
        if accepted < len(record.tasks):
            at = (number, report.scores[number - 1])
            scores.annotate(
                f"{accepted} of {len(record.tasks)}", at, xytext=(0, -18), textcoords="offset points", ha="center"
            )
    scores.set(xlabel="round", ylabel=f"{report.metric} on held-out data", title=report.metric.capitalize())
    scores.grid(alpha=0.3)
    scores.legend(loc="best")

    names = [worker.worker for worker in report.workers]
    left = [0.0] * len(names)
    for attribute, label in _PARTS:
        values = [getattr(worker, attribute) for worker in report.workers]
        times.barh(names, values, left=left, label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    times.invert_yaxis()
    times.set(xlabel="seconds a round, mean", title="Where the time goes")
    times.grid(alpha=0.3, axis="x")
    times.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)

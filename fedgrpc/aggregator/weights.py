"""The weight of an update in the mean."""

from __future__ import annotations

from collections.abc import Mapping

from fedgrpc.aggregator.report import Report
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN, TaskKind


def weight_of(worker_weights: Mapping[str, float], kind: TaskKind, worker: str, report: Report) -> float:
    """p_m where the operator has set any (1 for workers not named), else the count of examples.

    An update that is a mean itself brings the sum of such weights along.
    """
    chosen = worker_weights if kind == TASK_KIND_TRAIN else {}
    usual = 1.0 if chosen else float(report.example_count)
    return chosen.get(worker, report.weight or usual)

"""The weight of an update in the mean."""

from __future__ import annotations

from collections.abc import Mapping

from fedgrpc.aggregator.report import Report
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN, TaskKind


def weight_of(worker_weights: Mapping[str, float], kind: TaskKind, worker: str, report: Report) -> float:
    """Return p_m where the operator has set it for this worker, else the count of examples.

    A partial aggregate carries the sum of such weights.
    """
    usual = report.weight or float(report.example_count)
    return worker_weights.get(worker, usual) if kind == TASK_KIND_TRAIN else usual

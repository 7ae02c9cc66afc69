"""The figures of a round's record, by the names under which every tracker shows them.

loss, accuracy, ...         scores of the version by workers; evaluator/loss by evaluators
train/loss, ...             what workers say of their training
round/seconds, round/updates
bytes/down, bytes/up        of this round's tasks
"""

from __future__ import annotations

import math

from fedgrpc.v1 import round_pb2


def figures(record: round_pb2.Round) -> dict[str, float]:
    """Return the figures of a round; those that are not finite are left out."""
    tasks = record.tasks
    found = {
        **record.metrics,
        **{f"evaluator/{name}": value for name, value in record.evaluator_metrics.items()},
        **{f"train/{name}": value for name, value in record.training_metrics.items()},
        "round/seconds": record.duration_seconds,
        "round/updates": float(sum(task.phase == round_pb2.TASK_PHASE_ACCEPTED for task in tasks)),
        "bytes/down": float(sum(task.download_bytes for task in tasks)),
        "bytes/up": float(sum(task.upload_bytes for task in tasks)),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}

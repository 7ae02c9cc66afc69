"""Cost of each candidate plan on this device, measured by a few steps of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from fedgrpc.cli.planning import PlannedModel
from fedgrpc.errors import FedgrpcError
from fedgrpc.process import forget_peak_memory, peak_memory_bytes
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.cost import Observation
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.trainer import Trainer, TrainJob, Weights


def measured(
    trainer: Trainer,
    model: PlannedModel,
    plans: Sequence[LocalModelPlan],
    steps: int,
    epochs: float,
    tell: Callable[[str], None],
) -> list[Observation]:
    """Measure a round's training of each plan on this machine by `steps` steps of it, the smallest first.

    `tell` gets a line for each plan that cannot be trained here.
    """
    weights, found = trainer.initial_weights(), []
    for plan in sorted(plans, key=lambda plan: model.size_of(plan).share):
        size = model.size_of(plan)
        given = _sliced(weights, model.channels, plan)
        try:
            # The first step loads libraries and allocates buffers for all later ones.
            _train(trainer, given, plan, 1, epochs)
            forget_peak_memory()
            local_s, tensor_bytes = _train(trainer, given, plan, steps, epochs)
        except FedgrpcError as error:
            tell(f"{plan.to_line()} cannot be trained here: {error}")
            continue
        peak = peak_memory_bytes()
        kind = plan, size.technique
        found.append(
            Observation(size.share, size.weights_bytes, 0, local_s, 0, 0, 0, peak, tensor_bytes, 0.0, *kind)
        )
    return found


def _train(
    trainer: Trainer, weights: Weights, plan: LocalModelPlan, steps: int, epochs: float
) -> tuple[float, int]:
    """Return the seconds that all steps of the epochs would take, and the bytes of tensors."""
    done = itertools.count(1)
    totals: list[int] = []
    job = TrainJob(
        epochs=epochs,
        local_model=None if plan.plain else plan,
        time_left_s=lambda: float(steps - next(done)),
        report=lambda _, total: totals.append(total),
    )
    begun = time.perf_counter()
    result = trainer.train(weights, job)
    return (time.perf_counter() - begun) * totals[-1] / max(1, result.steps), result.tensor_bytes


def _sliced(weights: Weights, channels: ChannelMap | None, plan: LocalModelPlan) -> Weights:
    if channels is None or plan.sub_model(0).whole:
        return {name: array.copy() for name, array in weights.items()}
    kept = channels.select(plan.sub_model(0), weights)
    return {
        name: kept.coverage(name, array.shape).take(array).copy()
        for name, array in weights.items()
        if kept.has(name)
    }

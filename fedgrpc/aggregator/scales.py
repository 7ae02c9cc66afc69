"""How far each update of a round counts: for unequal local work, and for coming late.

The rule: a pure function of what was stored with the updates, so that a commit done again gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedgrpc.aggregation.scale import accumulated_steps, nova_scales, staleness_scale
from fedgrpc.aggregator.report import CurrentRound, Report
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UpdateRefused
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN, Plan


def check_steps(report: Report, plan: Plan) -> None:
    """Raises `UpdateRefused` for a count of steps that cannot be, of which others' updates would depend."""
    if report.merged_updates:
        raise UpdateRefused("updates are normalized by their steps in this run, and a mean of updates has none")
    most = math.ceil((plan.epochs or 1.0) * report.example_count)
    most = min(most, plan.max_steps) if plan.max_steps else most
    if not 1 <= report.steps <= most:
        raise UpdateRefused(f"{report.steps} steps are reported, which have to be from 1 to {most}")


def scales_of(
    settings: AggregatorSettings, plan: Plan, current: CurrentRound, weights: Mapping[str, float]
) -> dict[str, float]:
    """The factor on each update: FedNova's (arXiv 2007.07481) where steps are normalized, times FedBuff's for
    staleness (arXiv 2106.06639). Raises `UpdateRefused` for an update without steps.
    """
    if current.kind != TASK_KIND_TRAIN:
        return dict.fromkeys(weights, 1.0)
    scales = dict.fromkeys(weights, 1.0)
    if settings.normalize_steps:
        proximal = plan.proximal_mu * plan.learning_rate
        steps = {token: current.reports[token].steps for token in weights}
        if not all(steps.values()):
            raise UpdateRefused("an update that reports no steps cannot be normalized")
        work = [accumulated_steps(count, plan.momentum, proximal) for count in steps.values()]
        scales = dict(zip(weights, nova_scales(list(weights.values()), work), strict=True))
    exponent = settings.staleness_exponent
    tasks = current.state.tasks
    return {token: scale * staleness_scale(tasks[token].staleness, exponent) for token, scale in scales.items()}

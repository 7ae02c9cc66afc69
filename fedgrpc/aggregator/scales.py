"""How far each update of a round counts: for unequal local work, for its length, and for coming late.

The rule: a pure function of what was stored with the updates, so that a commit done again gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from fedgrpc.aggregation.scaling import (
    accumulated_steps,
    clip_scale,
    effective_steps,
    nova_scales,
    staleness_scale,
)
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.training_instructions import TrainingInstructions
from fedgrpc.errors import UnusableUpdate, UpdateRefused
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import Report
from fedgrpc.training_plan import TrainingPlan

# A mean of what the bound holds for may be above it by rounding.
_SLACK: Final = 1 + 1e-9


def check_steps(report: Report, plan: TrainingPlan, examples: float) -> None:
    """Raises `UpdateRefused` for a count of steps that cannot be, of which others' updates would depend.

    `examples`: for how many the update counts at most.
    Of a mean: for what the steps of its updates cannot amount to, each of fewer examples than all of them have.
    """
    most = math.ceil((plan.epochs or 1.0) * examples)
    most = min(most, plan.max_steps) if plan.max_steps else most
    if report.merged_updates:
        bound = _accumulated(max(1, most), plan)
        if not 1 <= report.accumulated_steps <= bound * _SLACK:
            told = f"{report.accumulated_steps:g} accumulated steps are reported"
            raise UpdateRefused(f"{told}, which have to be from 1 to {bound:g}")
    elif not 1 <= report.steps <= most:
        raise UpdateRefused(f"{report.steps} steps are reported, which have to be from 1 to {most}")


def scales_of(
    settings: AggregatorSettings,
    instructions: TrainingInstructions,
    round_: RoundInProgress,
    weights: Mapping[str, float],
    norms: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """The factor on each update: FedNova's (arXiv 2007.07481) where steps are normalized, or what clips it to
    `clip_norm` where `norms` are given, times FedBuff's for staleness (arXiv 2106.06639).

    Raises `UnusableUpdate` for an update without steps.
    """
    if round_.kind is not TaskKind.TRAIN:
        return dict.fromkeys(weights, 1.0)
    scales = dict.fromkeys(weights, 1.0)
    if instructions.normalize_steps:
        work = _work(instructions.plan, round_, weights)
        scales = dict(zip(weights, nova_scales(list(weights.values()), work), strict=True))
    if instructions.clip_norm is not None:
        scales = {token: clip_scale(norms[token], instructions.clip_norm) for token in weights}
    exponent = settings.staleness_exponent
    tasks = round_.state.tasks
    return {token: scale * staleness_scale(tasks[token].staleness, exponent) for token, scale in scales.items()}


def accumulated_of(
    instructions: TrainingInstructions, round_: RoundInProgress, weights: Mapping[str, float]
) -> float:
    """tau_eff: what the steps of an update amount to, as the weighted mean of all; 0 where none are normalized.

    Raises as `scales_of`.
    """
    if round_.kind is not TaskKind.TRAIN or not instructions.normalize_steps:
        return 0.0
    return effective_steps(list(weights.values()), _work(instructions.plan, round_, weights))


def _work(plan: TrainingPlan, round_: RoundInProgress, tokens: Iterable[str]) -> list[float]:
    """What the steps of each update amount to; a mean says it of its own."""
    return [_work_of(plan, token, round_.report(token)) for token in tokens]


def _work_of(plan: TrainingPlan, token: str, report: Report) -> float:
    if not (report.accumulated_steps if report.merged_updates else report.steps):
        raise UnusableUpdate("an update that reports no steps cannot be normalized", token=token)
    return report.accumulated_steps if report.merged_updates else _accumulated(report.steps, plan)


def _accumulated(steps: int, plan: TrainingPlan) -> float:
    return accumulated_steps(steps, plan.momentum or 0.0, plan.proximal_mu * (plan.learning_rate or 0.0))

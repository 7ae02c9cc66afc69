"""Scores of the version that a round's workers were given.

The rule: scores of the whole model come before scores of sub-models, and the two are never mixed. Scores of a
worker weigh no more examples than its update may, and none where its update weighs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedgrpc import claims
from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import Report
from fedgrpc.runs.weights import Weighing, score_weights


@dataclass(frozen=True)
class Scores:
    """Mean of the workers' scores by examples, over how many examples, and whether each is of a sub-model.

    `not_finite`: names of those that are NaN or infinite on some worker, as many as one report may have.
    """

    metrics: dict[str, float]
    example_count: int
    of_sub_models: bool
    not_finite: tuple[str, ...] = ()


def scores_of(
    round_: RoundInProgress, weights: Mapping[str, float], weighing: Weighing, max_share: float | None
) -> Scores:
    """Return the scores of the round's base version by the reports of these tasks, whose updates weigh this much.

    Where no worker holds the whole model, they are of sub-models: a fleet of narrow devices has a score, too.
    Scores of older versions, by carried-over tasks, are left out.
    """
    counted = [token for token, weight in weights.items() if weight > 0]
    given = [token for token in counted if round_.version_of(token) == round_.base_version]
    scored = [token for token in given if round_.report(token).evaluation_metrics]
    whole = [token for token in scored if _is_whole(round_, token)]
    reports = {token: round_.report(token) for token in whole or scored}
    workers = {token: round_.state.tasks[token].worker for token in reports}
    counts = score_weights(weighing, reports, workers, max_share)
    not_finite = {name for token in given for name in round_.report(token).scores_not_finite}
    told = sorted(not_finite)[: claims.METRICS]
    mean = _mean([(report, counts[token]) for token, report in reports.items()], bool(scored) and not whole)
    return replace(mean, not_finite=tuple(told))


def for_log(metrics: Mapping[str, float], *own: str) -> dict[str, float]:
    """Scores as keys of a log line that has the keys `own`: workers choose the names of their scores."""
    taken = {"event", "run", "level", "timestamp", *own}
    return {f"score_{name}" if name in taken else name: value for name, value in metrics.items()}


def _is_whole(round_: RoundInProgress, token: str) -> bool:
    return round_.local_task(token).sub_model.whole and not round_.report(token).scores_of_sub_models


def _mean(reports: list[tuple[Report, float]], of_sub_models: bool) -> Scores:
    metrics = mean_metrics([(report.evaluation_metrics, count) for report, count in reports])
    return Scores(metrics, round(sum(count for _, count in reports)), of_sub_models)

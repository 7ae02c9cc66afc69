"""Scores of the version that a round's workers were given.

The rule: scores of the whole model come before scores of sub-models, and the two are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.aggregator.report import CurrentRound, Report


@dataclass(frozen=True)
class Scores:
    """Mean of the workers' scores by examples, over how many examples, and whether each is of a sub-model."""

    metrics: dict[str, float]
    example_count: int
    of_sub_models: bool


def scores_of(current: CurrentRound, tokens: Iterable[str]) -> Scores:
    """Return the scores of the round's base version by the reports of these tasks.

    Where no worker holds the whole model, they are of sub-models: a fleet of narrow devices has a score, too.
    Scores of older versions, by carried-over tasks, are left out.
    """
    given = [token for token in tokens if current.version_of(token) == current.base_version]
    scored = [token for token in given if current.reports[token].evaluation_metrics]
    whole = [current.reports[token] for token in scored if _is_whole(current, token)]
    return _mean(whole or [current.reports[token] for token in scored], bool(scored) and not whole)


def _is_whole(current: CurrentRound, token: str) -> bool:
    return current.local_task(token).sub_model.whole and not current.reports[token].scores_of_sub_models


def _mean(reports: list[Report], of_sub_models: bool) -> Scores:
    metrics = mean_metrics([(report.evaluation_metrics, report.evaluation_example_count) for report in reports])
    return Scores(metrics, sum(report.evaluation_example_count for report in reports), of_sub_models)

"""Weighing of updates: the operator's rules on weights, by which the accepted updates of a round make a `Merge`.

The rule: a pure function of what was stored with the updates, so that a commit done again gives the same bits. No
claim weighs more than the operator's limits. Scores of a worker weigh no more examples than its update may, and
none where its update weighs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from fedgrpc import claims
from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.aggregation.noise import say
from fedgrpc.aggregation.scaling import (
    accumulated_steps,
    clip_scale,
    effective_steps,
    nova_scales,
    quantile,
    staleness_scale,
)
from fedgrpc.algorithms.algorithm import Algorithm, Counted
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.errors import UnusableUpdate, UpdateRefused
from fedgrpc.rounds.policy import TaskKind, capped
from fedgrpc.runs.merge import Merge, Scores
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import Report
from fedgrpc.submodels.channels import KeptChannels
from fedgrpc.training_plan import TrainingPlan

# The mean of numbers within a bound may be above it by rounding.
_SLACK: Final = 1 + 1e-9
_NOTHING: Mapping[str, float] = MappingProxyType({})
_NONE_MIXED: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Weighing:
    """Rules of the operator on weights: p_m of workers, and what an example count may weigh (None: all of it).

    `by_noise`: an update weighs the less, the more noise its worker has measured of its number format.
    `leaves_named`: an aggregator is here because the operator named it, and its means count for all their
    workers. Of any other, a mean weighs no more than a worker's own update could. `max_share`: the largest share
    of one worker. `max_total`: the most that all updates weigh together. `plan` has the algorithm, and bounds
    steps. `clip_norm`: the longest that an update counts; `clip_quantile`: this quantile of the round's norms.
    `staleness_exponent` lowers old updates. With `cohort` every update of training weighs the same, and their
    sum is divided by this count of devices, however many came.
    """

    worker_weights: Mapping[str, float]
    max_examples: int | None = None
    leaves_named: bool = False
    max_share: float | None = None
    max_total: float | None = None
    plan: TrainingPlan = field(default_factory=TrainingPlan)
    clip_norm: float | None = None
    staleness_exponent: float = 0.0
    clips_buffers: bool = False
    by_noise: bool = True
    clip_quantile: float | None = None
    cohort: int | None = None

    def weight_of(self, kind: TaskKind, worker: str, report: Report, here: Collection[str]) -> float:
        """Return p_m where the operator has set it for this worker, else the bounded count of examples.

        A worker's own update weighs that times its say. A partial aggregate carries the sum of such weights.
        `here` are the workers of the round: what is set for these is in no partial aggregate.
        """
        if self.cohort is not None and kind is TaskKind.TRAIN:
            return 1.0
        # Scores and first models are no votes: p_m is for training alone.
        chosen = self.worker_weights if kind is TaskKind.TRAIN else {}
        if worker in chosen:
            return chosen[worker] * self._say(report)
        counted = self.examples(report.example_count, report)
        if not report.merged_updates:
            return counted * self._say(report)
        # A leaf names no workers, so its claim may reach what its examples weigh, and what the operator has set
        # for workers that are not here. A leaf that nobody named gets the larger of the two, and not the sum.
        elsewhere = math.fsum(weight for name, weight in chosen.items() if name not in here)
        return min(report.weight, counted + elsewhere if self.leaves_named else max(counted, elsewhere))

    @property
    def algorithm(self) -> Algorithm:
        """The federated algorithm of the plan. Raises `UsageError` where it cannot be had here."""
        return algorithm_of(self.plan.algorithm)

    @property
    def needs_norms(self) -> bool:
        """True if `merge` needs the norm of every update."""
        return self.clips or self.algorithm.uses_norms

    @property
    def clips(self) -> bool:
        """True if updates are scaled down to a norm."""
        return self.clip_norm is not None or self.clip_quantile is not None

    def _longest(self, norms: Mapping[str, float]) -> float:
        """Return the norm to which updates are scaled down.

        The quantile is that of this round's norms. Adaptive clipping (arXiv 1905.03871) estimates it over rounds,
        since it may not look at norms. The aggregator sees them here.
        """
        fixed = math.inf if self.clip_norm is None else self.clip_norm
        return fixed if self.clip_quantile is None else min(fixed, quantile(norms.values(), self.clip_quantile))

    def _say(self, report: Report) -> float:
        """Return the say of an update by the noise that its worker has measured; at most 1."""
        return say(report.noise_ratio) if self.by_noise else 1.0

    def examples(self, claimed: int, report: Report) -> float:
        """Return the weight of a claimed count of examples."""
        if self.max_examples is None:
            return float(claimed)
        # A mean may weigh as much as the updates in it could, each at its own limit.
        return float(min(claimed, self.max_examples * self.workers(report)))

    def workers(self, report: Report) -> int:
        """Return the number of workers that an update counts for."""
        # A count is a claim. It counts only of a leaf that the operator trusts with it.
        return max(1, report.merged_updates) if self.leaves_named else 1

    def check_steps(self, report: Report) -> None:
        """Raise `UpdateRefused` for a count of steps that cannot be, on which others' updates would depend.

        A mean may report what its updates can amount to, each of no more examples than all of them have.
        """
        examples = self.examples(report.example_count, report)
        # A step takes at least one example, so no plan has more steps than examples times epochs.
        most = math.ceil((self.plan.epochs or 1.0) * examples)
        most = min(most, self.plan.max_steps) if self.plan.max_steps else most
        if report.merged_updates:
            # What steps amount to grows with their number, so the most steps give the bound.
            bound = self._accumulated(max(1, most))
            if not 1 <= report.accumulated_steps <= bound * _SLACK:
                told = f"{report.accumulated_steps:g} accumulated steps are reported"
                raise UpdateRefused(f"{told}, which have to be from 1 to {bound:g}")
        elif not 1 <= report.steps <= most:
            raise UpdateRefused(f"{report.steps} steps are reported, which have to be from 1 to {most}")

    def merge(
        self,
        round_: RoundInProgress,
        tokens: Sequence[str],
        sub_models: Mapping[str, KeptChannels | None] = MappingProxyType({}),
        norms: Mapping[str, float] = _NOTHING,
    ) -> Merge:
        """Return what a commit of these accepted updates averages; `norms` of each where they are clipped.

        Raises `UpdateRefused` when all weights are zero, and `UnusableUpdate` for an update without steps that are
        to be normalized.
        """
        reports = {token: round_.report(token) for token in tokens}
        workers = {token: task.worker for token, task in round_.state.tasks.items()}
        weights = self._weights(round_.kind, reports, workers)
        scales, accumulated, mixed = dict.fromkeys(weights, 1.0), 0.0, _NONE_MIXED
        if round_.kind is TaskKind.TRAIN:
            scales, accumulated = self._scales(round_, weights, reports, norms)
            if self.algorithm.mixing(0) is not None:
                mixed = {token: round_.version_of(token) for token in weights}
        return Merge(
            weights,
            scales,
            sub_models,
            {token: report.weight for token, report in reports.items() if report.merged_updates},
            round_.keeps,
            self.clips_buffers,
            self.scores(round_, weights),
            mean_metrics([(reports[token].metrics, weight) for token, weight in weights.items()]),
            accumulated,
            sum(self.workers(report) for report in reports.values()),
            mixed=mixed,
        )

    def _scales(
        self,
        round_: RoundInProgress,
        weights: Mapping[str, float],
        reports: Mapping[str, Report],
        norms: Mapping[str, float],
    ) -> tuple[dict[str, float], float]:
        """Return the factor on the difference of each update, and the steps that count of each; 0: all of them."""
        accumulated = 0.0
        if self.algorithm.normalizes:
            # FedNova, arXiv 2007.07481: every update counts as if it had taken as many steps as the mean.
            work = [self._work(token, report) for token, report in reports.items()]
            scales = dict(zip(weights, nova_scales(list(weights.values()), work), strict=True))
            accumulated = effective_steps(list(weights.values()), work)
        else:
            scales = self._algorithms_scales(weights, reports, norms)
        # Never of scales by steps: the settings refuse both together.
        if self.clips:
            longest = self._longest(norms)
            scales = {token: scale * clip_scale(norms[token], longest) for token, scale in scales.items()}
        if self.cohort is not None:
            # The mean divides by the count of updates, which is none of anybody's business: arXiv 1710.06963.
            scales = {token: scale * len(scales) / self.cohort for token, scale in scales.items()}
        # Last, since it lowers whatever the algorithm made of an old update.
        stale = {token: self._age_scale(round_.state.tasks[token].staleness) for token in scales}
        return {token: scale * stale[token] for token, scale in scales.items()}, accumulated

    def _age_scale(self, staleness: int) -> float:
        """Return the factor on an update that is so many versions old: FedAsync's, else FedBuff's (2106.06639)."""
        mixing = self.algorithm.mixing(staleness)
        return staleness_scale(staleness, self.staleness_exponent) if mixing is None else mixing

    def _algorithms_scales(
        self, weights: Mapping[str, float], reports: Mapping[str, Report], norms: Mapping[str, float]
    ) -> dict[str, float]:
        counted = [
            Counted(weight, norms.get(token), reports[token].evaluation_metrics.get("loss"))
            for token, weight in weights.items()
        ]
        return dict(zip(weights, self.algorithm.scales(counted, self.plan), strict=True))

    def _weights(
        self, kind: TaskKind, reports: Mapping[str, Report], workers: Mapping[str, str]
    ) -> dict[str, float]:
        here = frozenset(workers.values())
        weights = {token: self.weight_of(kind, workers[token], report, here) for token, report in reports.items()}
        if self.cohort is not None and not weights:
            return {}
        # Not `<= 0`: a sum that is NaN is refused, too.
        if not sum(weights.values()) > 0:
            raise UpdateRefused("the weights of all accepted updates are zero")
        # Shares of what all weigh, so after each is bounded by itself. The mean of a leaf counts as its workers.
        counts = {token: self.workers(report) for token, report in reports.items()}
        weights = shared(weights, workers, counts, self.max_share)
        # The sum of a leaf becomes a claim to its parent, which refuses what is above the range of claims.
        total = sum(weights.values())
        if self.max_total is None or total <= self.max_total:
            return weights
        return {token: weight * (self.max_total / total) for token, weight in weights.items()}

    def _work(self, token: str, report: Report) -> float:
        """Return what the steps of an update amount to. A mean says it itself."""
        steps = report.accumulated_steps if report.merged_updates else report.steps
        if not steps:
            raise UnusableUpdate("an update that reports no steps cannot be normalized", token=token)
        return steps if report.merged_updates else self._accumulated(report.steps)

    def _accumulated(self, steps: int) -> float:
        plan = self.plan
        return accumulated_steps(steps, plan.momentum or 0.0, self.algorithm.mu * (plan.learning_rate or 0.0))

    def scores(self, round_: RoundInProgress, weights: Mapping[str, float]) -> Scores:
        """Return the scores of the round's base version by the reports of these updates.

        Scores of the whole model come before scores of sub-models, and the two are never mixed: where no worker
        holds the whole model, a fleet of narrow devices has a score, too. Scores of older versions, by
        carried-over tasks, are left out.
        """
        # An update that weighs nothing has no say on the score either.
        counted = [token for token, weight in weights.items() if weight > 0]
        given = {token: round_.report(token) for token in counted if _is_given_base(round_, token)}
        scored = [token for token, report in given.items() if report.evaluation_metrics]
        whole = [token for token in scored if _is_whole(round_, token)]
        reports = {token: given[token] for token in whole or scored}
        counts = score_weights(
            self, reports, {token: round_.state.tasks[token].worker for token in reports}, self.max_share
        )
        not_finite = {name for report in given.values() for name in report.scores_not_finite}
        return Scores(
            mean_metrics([(report.evaluation_metrics, counts[token]) for token, report in reports.items()]),
            round(sum(counts.values())),
            bool(scored) and not whole,
            tuple(sorted(not_finite)[: claims.METRICS]),
        )


def _is_given_base(round_: RoundInProgress, token: str) -> bool:
    return round_.version_of(token) == round_.base_version


def _is_whole(round_: RoundInProgress, token: str) -> bool:
    local = round_.local_task(token)
    whole = local.sub_model.whole and local.plan.pruning is None and local.plan.clustering is None
    return whole and not round_.report(token).scores_of_sub_models


def shared(
    weights: Mapping[str, float], workers: Mapping[str, str], counts: Mapping[str, int], max_share: float | None
) -> dict[str, float]:
    """Return the weights by token, lowered so that no worker has more than `max_share` of their sum.

    `workers` has the worker of each token, which may have more than one, and `counts` how many it stands for.
    """
    if max_share is None:
        return dict(weights)
    # By worker: one with a carried-over task beside its new one would otherwise have two shares.
    tokens: dict[str, list[str]] = {}
    for token in weights:
        tokens.setdefault(workers[token], []).append(token)
    # `fsum` is exact, so that the result does not depend on the order of the updates.
    sums = {worker: math.fsum(weights[token] for token in own) for worker, own in tokens.items()}
    sizes = [max(counts[token] for token in own) for own in tokens.values()]
    factors = _factors(list(sums.values()), capped(list(sums.values()), max_share, sizes))
    by_worker = dict(zip(sums, factors, strict=True))
    return {token: weight * by_worker[workers[token]] for token, weight in weights.items()}


def score_weights(
    weighing: Weighing, reports: Mapping[str, Report], workers: Mapping[str, str], max_share: float | None
) -> dict[str, float]:
    """Return the weight of the scores in each report: their examples, bounded as the examples of an update are."""
    weights = {
        token: min(float(report.evaluation_example_count), weighing.examples(report.example_count, report))
        for token, report in reports.items()
    }
    counts = {token: weighing.workers(report) for token, report in reports.items()}
    return shared(weights, workers, counts, max_share)


def _factors(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [low / high if high > 0 else 1.0 for high, low in zip(before, after, strict=True)]

"""The weight of an update in the mean.

The rule: a pure function of what was stored with the updates, and no claim weighs more than the operator's limits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedgrpc.rounds.policy import TaskKind, capped
from fedgrpc.runs.task_context import Report


@dataclass(frozen=True)
class Weighing:
    """Rules of the operator on weights: p_m of workers, and what an example count may weigh (None: all of it).

    `leaves_named`: an aggregator is here because the operator named it, and its means count for all their workers.
    Of any other, a mean weighs no more than a worker's own update could.
    """

    worker_weights: Mapping[str, float]
    max_examples: int | None = None
    leaves_named: bool = False

    def weight_of(self, kind: TaskKind, worker: str, report: Report, here: Collection[str]) -> float:
        """Return p_m where the operator has set it for this worker, else the bounded count of examples.

        A partial aggregate carries the sum of such weights. `here` are the workers of the round: what is set for
        these is in nobody's partial aggregate.
        """
        chosen = self.worker_weights if kind is TaskKind.TRAIN else {}
        if worker in chosen:
            return chosen[worker]
        counted = self.examples(report.example_count, report)
        if not report.merged_updates:
            return counted
        elsewhere = math.fsum(weight for name, weight in chosen.items() if name not in here)
        return min(report.weight, counted + elsewhere if self.leaves_named else max(counted, elsewhere))

    def examples(self, claimed: int, report: Report) -> float:
        """Return the weight of a claimed count of examples."""
        if self.max_examples is None:
            return float(claimed)
        return float(min(claimed, self.max_examples * self.workers(report)))

    def workers(self, report: Report) -> int:
        """Return the number of workers that an update counts for."""
        return max(1, report.merged_updates) if self.leaves_named else 1


def shared(
    weights: Mapping[str, float], workers: Mapping[str, str], counts: Mapping[str, int], max_share: float | None
) -> dict[str, float]:
    """The weights by token, lowered so that no worker has more than `max_share` of their sum.

    `workers` has the worker of each token, which may have more than one, and `counts` how many it stands for.
    """
    if max_share is None:
        return dict(weights)
    tokens: dict[str, list[str]] = {}
    for token in weights:
        tokens.setdefault(workers[token], []).append(token)
    sums = {worker: math.fsum(weights[token] for token in its) for worker, its in tokens.items()}
    sizes = [max(counts[token] for token in its) for its in tokens.values()]
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

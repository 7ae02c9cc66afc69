"""Scores of versions: by the workers of a round, and by evaluators.

The rule: scores are kept with the round that wrote the version. They may end the run, once they are durable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.rounds.version import Jump
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.events import Evaluated, TargetMet, VersionKnown
from fedgrpc.runs.merge import Scores

log = structlog.get_logger()
_NONE: Mapping[str, float] = {}


class VersionScores:
    """Keeps the scores of one run's versions."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._settings = coordinator.settings
        self._log = log.bind(run=coordinator.settings.run_name)

    async def by_workers(self, version: int, scores: Scores) -> None:
        """Keep what the workers of a committed round say of the version they were given."""
        if scores.metrics:
            told = for_log(scores.metrics, "version", "by")
            self._log.info("version scored", version=version, by="workers", **told)
        if scores.not_finite:
            self._log.warning("scores not finite", version=version, names=scores.not_finite)
        if scores.metrics or scores.not_finite:
            await self._keep(version, scores.metrics, _NONE, scores.of_sub_models, scores.not_finite)

    async def by_evaluator(self, task: Evaluation, metrics: dict[str, float], example_count: int) -> None:
        """Keep an evaluator's scores, averaged with those of others of the same version."""
        coordinator = self._coordinator
        coordinator.apply(Evaluated(task, metrics, example_count))
        found = coordinator.machine.evaluations.scores_of(task.version)
        mean = metrics if found is None else found[1]
        told = for_log(mean, "worker", "version")
        self._log.info("version scored", worker=task.worker, version=task.version, **told)
        await self._keep(task.version, _NONE, mean)
        coordinator.news()

    async def _keep(
        self,
        version: int,
        workers: Mapping[str, float],
        evaluator: Mapping[str, float],
        of_sub_models: bool = False,
        not_finite: Sequence[str] = (),
    ) -> None:
        coordinator, versions = self._coordinator, self._coordinator.machine.versions
        coordinator.metrics.observe_scores(workers, "global")
        coordinator.metrics.observe_scores(evaluator, "evaluator")
        told = {**workers, **evaluator}
        jump = Jump.SCORES if versions.score_jumps(version, told) else Jump.NONE
        kept = await coordinator.records.add_scores(version, workers, evaluator, of_sub_models, not_finite, jump)
        for known in await coordinator.in_database(coordinator.store.versions, [version]):
            if version in coordinator.machine.versions:
                coordinator.apply(VersionKnown(known))
        if jump is not Jump.NONE:
            self._log.warning("scores are far worse than the best", version=version, scores=told)
        if not kept:
            return
        target = self._settings.target
        # Scores of evaluators that the operator has not named are shown, and nothing else.
        trusted = {**workers, **(evaluator if self._settings.evaluators_named else {})}
        if target is not None and target.met(trusted):
            coordinator.apply(TargetMet(f"version {version} has {target}"))
        coordinator.news()


def for_log(metrics: Mapping[str, float], *own: str) -> dict[str, float]:
    """Scores as keys of a log line that has the keys `own`: workers choose the names of their scores."""
    taken = {"event", "run", "level", "timestamp", *own}
    return {f"score_{name}" if name in taken else name: value for name, value in metrics.items()}

"""Records of rounds, and the scores of the versions that they wrote.

The rule: a round is recorded with its version and the histories of its workers in one transaction. Scores are kept
with the round that wrote the version. They may end the run, once they are durable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog

from fedgrpc.aggregator.histories import RunWorkers, histories_after
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.metrics import Metrics
from fedgrpc.protocol.rounds import RoundRecords, record_of
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.runs.evaluations import Evaluation
from fedgrpc.runs.events import EndReason, Evaluated, RoundsRestored, TargetMet, VersionKnown
from fedgrpc.runs.keeping import out_of_patience
from fedgrpc.runs.merge import Scores
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.task_rows import carried_rows, rows_of
from fedgrpc.tracking.rounds import figures
from fedgrpc.tracking.tracking import NOT_TRACKED, Tracking
from fedgrpc.v1.round_pb2 import TASK_KIND_EVALUATE
from fedgrpc.v1.round_pb2 import Round as RoundRecord

log = structlog.get_logger()
_NO_SCORES: Mapping[str, float] = {}


class RecordedRounds:
    """The rounds of `store`, whose methods run `in_database`. `last` is the record of the last that ended."""

    def __init__(
        self,
        store: RunStore,
        in_database: Callable[..., Awaitable[Any]],
        workers: RunWorkers,
        tracking: Tracking = NOT_TRACKED,
    ) -> None:
        self._store = store
        self._in_database = in_database
        self._workers = workers
        self._tracking = tracking
        self._in_progress = RoundRecords()
        self.last: RoundRecord | None = None

    async def restore(self) -> RoundsRestored:
        """Read the last record. Raises `StorageError`."""
        self.last = await self._in_database(self._store.round)
        if self.last is None:
            return RoundsRestored(0)
        written = await self._in_database(self._store.round_of_latest_version)
        closing = self.last.kind != TASK_KIND_EVALUATE and (written is None or _asks_for_scores(written))
        return RoundsRestored(self.last.number, closing)

    async def end(self, round_: RoundInProgress, now: float, version: Version | None = None) -> RoundRecord:
        """Make durable how a round ended, with the version that it made. Raises `StorageError`."""

        def store() -> tuple[RoundRecord, dict[str, WorkerHistory]]:
            # In the thread: with a thousand tasks this takes its time.
            record, histories = record_of(round_, now), histories_after(round_, self._workers)
            rows = [*rows_of(round_), *carried_rows(round_, now)]
            self._store.finish_round(record, rows, histories, version)
            return record, histories

        record: RoundRecord
        record, histories = await self._in_database(store)
        self._workers.remember(histories)
        # The version is known only after this, so that its scores find the record.
        if self.last is None or record.number >= self.last.number:
            self.last = record
        self._track(record)
        return record

    def _track(self, record: RoundRecord) -> None:
        ended_s = record.started_at.ToMilliseconds() / 1000 + record.duration_seconds
        self._tracking.log(record.number, figures(record), ended_s)

    async def roll_back(self, record: RoundRecord, version: Version) -> None:
        """Record a round without tasks that copied a version. Raises `StorageError`."""
        await self._in_database(self._store.finish_round, record, [], {}, version)
        self.last = record

    async def add_scores(
        self,
        version: int,
        workers: Mapping[str, float],
        evaluator: Mapping[str, float],
        of_sub_models: bool,
        not_finite: Sequence[str],
        jump: Jump,
    ) -> bool:
        """Add scores to the record of the round that wrote a version; whether there is one."""
        record = await self._in_database(
            self._store.add_scores, version, workers, evaluator, of_sub_models, not_finite, jump
        )
        if record is not None and self.last is not None and self.last.number == record.number:
            self.last = record
        if record is not None:
            self._track(record)
        return record is not None

    def shown(self, round_: RoundInProgress | None, now: float) -> RoundRecord | None:
        """Return the record of the round in progress, else of the last one."""
        return self.last if round_ is None else self._in_progress.record(round_, now)


def _asks_for_scores(written: RoundRecord) -> bool:
    """Return whether a version is to be scored as the one before was, by the workers of its round."""
    scored = (task for task in written.tasks if task.weight and not task.staleness)
    return written.HasField("rolled_back_to") or any(task.evaluation_metrics for task in scored)


class VersionScores:
    """Keeps the scores of one run's versions."""

    def __init__(
        self, shell: RunShell, records: RecordedRounds, settings: AggregatorSettings, metrics: Metrics
    ) -> None:
        self._shell = shell
        self._records = records
        self._settings = settings
        self._metrics = metrics
        self._log = log.bind(run=settings.run_name)

    async def by_workers(self, version: int, scores: Scores) -> None:
        """Keep what the workers of a committed round say of the version they were given."""
        if scores.metrics:
            told = for_log(scores.metrics, "version", "by")
            self._log.info("version scored", version=version, by="workers", **told)
        if scores.not_finite:
            self._log.warning("scores not finite", version=version, names=scores.not_finite)
        if scores.metrics or scores.not_finite:
            await self._keep(version, scores.metrics, _NO_SCORES, scores.of_sub_models, scores.not_finite)

    async def by_evaluator(self, task: Evaluation, metrics: dict[str, float], example_count: int) -> None:
        """Keep an evaluator's scores, averaged with those of others of the same version."""
        shell = self._shell
        shell.apply(Evaluated(task, metrics, example_count))
        found = shell.machine.evaluations.scores_of(task.version)
        mean = metrics if found is None else found[1]
        told = for_log(mean, "worker", "version")
        self._log.info("version scored", worker=task.worker, version=task.version, **told)
        await self._keep(task.version, _NO_SCORES, mean)
        shell.news()

    async def _keep(
        self,
        version: int,
        workers: Mapping[str, float],
        evaluator: Mapping[str, float],
        of_sub_models: bool = False,
        not_finite: Sequence[str] = (),
    ) -> None:
        shell, versions = self._shell, self._shell.machine.versions
        self._metrics.observe_scores(workers, "global")
        self._metrics.observe_scores(evaluator, "evaluator")
        self._metrics.scores_not_finite.inc(len(not_finite))
        told = {**workers, **evaluator}
        jump = Jump.SCORES if versions.score_jumps(version, told) else Jump.NONE
        kept = await self._records.add_scores(version, workers, evaluator, of_sub_models, not_finite, jump)
        for known in await shell.in_database(shell.store.versions, [version]):
            if version in shell.machine.versions:
                shell.apply(VersionKnown(known))
        if jump is not Jump.NONE:
            self._metrics.jumps.labels("scores").inc()
            self._log.warning("scores are far worse than the best", version=version, scores=told)
        if not kept:
            return
        target = self._settings.target
        # Scores of evaluators that the operator has not named are shown, and nothing else.
        trusted = {**workers, **(evaluator if self._settings.evaluators_named else {})}
        if target is not None and target.name in trusted and target.met(trusted[target.name]):
            shell.apply(TargetMet(f"version {version} has {target}"))
        elif why := out_of_patience(shell.machine.versions, self._settings.patience):
            shell.apply(TargetMet(why, EndReason.NOT_BETTER))
        shell.news()


def for_log(metrics: Mapping[str, float], *own: str) -> dict[str, float]:
    """Scores as keys of a log line that has the keys `own`: workers choose the names of their scores."""
    taken = {"event", "run", "level", "timestamp", *own}
    return {f"score_{name}" if name in taken else name: value for name, value in metrics.items()}

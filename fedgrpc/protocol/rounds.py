"""The records of rounds, for operators and the database."""

from __future__ import annotations

from dataclasses import replace

from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import UsageError
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.plans import local_task_to_proto
from fedgrpc.protocol.records import (
    jump_to_proto,
    prediction_to_proto,
    timings_to_proto,
)
from fedgrpc.rounds import events
from fedgrpc.rounds.round import time_left
from fedgrpc.rounds.task import Task
from fedgrpc.rounds.version import Jump
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import Agreed, Downlink, Report, TaskContext
from fedgrpc.v1.round_pb2 import LossCause, RoundPhase, TaskKind, TaskPhase, TaskRecord
from fedgrpc.v1.round_pb2 import Round as RoundRecord


class RoundRecords:
    """Makes records of a round. An unchanged task keeps its record, since watchers ask often."""

    def __init__(self) -> None:
        self._round: int | None = None
        self._made: dict[str, tuple[tuple[object, ...], TaskRecord]] = {}

    def record(self, round_: RoundInProgress, now: float) -> RoundRecord:
        """Return the record of a round. `now` is of its own clock, since a wall clock may be set meanwhile."""
        if self._round != round_.number:
            self._round, self._made = round_.number, {}
        state = round_.state
        record = RoundRecord(
            number=state.number,
            phase=RoundPhase.Name(state.phase.value),
            base_version=round_.base_version,
            committed_version=state.version or 0,
            reason=state.reason,
            tasks=[self._task_record(round_, token, task) for token, task in state.tasks.items()],
            duration_seconds=round_.earlier_s + now - state.opened_at,
            training_metrics=round_.training_metrics,
            kind=TaskKind.Name(round_.kind),
            deadline_reason=state.deadline_reason,
        )
        if round_.jump is not Jump.NONE:
            record.jump = jump_to_proto(round_.jump)
        if (dominance := round_.dominance) is not None:
            record.dominance.worker, record.dominance.share = dominance.worker, dominance.share
        if state.deadline_at is not None:
            record.deadline.CopyFrom(duration_to_proto(state.deadline_s))
        if state.granted_s:
            record.reconnect_grace.CopyFrom(duration_to_proto(state.granted_s))
        record.started_at.FromNanoseconds(int(round_.started_at * 1e9))
        left_s = time_left(state, now)
        if left_s is not None and not state.phase.final:
            record.time_left.CopyFrom(duration_to_proto(left_s))
        return record

    def _task_record(self, round_: RoundInProgress, token: str, task: Task) -> TaskRecord:
        of = task, round_.context(token), round_.commit_s
        made = self._made.get(token)
        if made is None or made[0] != of:
            made = self._made[token] = of, _task_record(round_, task, round_.context(token))
        return made[1]


def record_of(round_: RoundInProgress, now: float) -> RoundRecord:
    """Return the record of a round. Any thread may call it."""
    return RoundRecords().record(round_, now)


def _task_record(round_: RoundInProgress, task: Task, context: TaskContext) -> TaskRecord:
    record = TaskRecord(
        worker=task.worker,
        kind=TaskKind.Name(round_.kind),
        phase=TaskPhase.Name(task.phase.value),
        reason=task.reason,
        loss_cause=LossCause.Name(task.loss_cause.value),
        progress=task.fraction,
        device_class=context.device_class,
        staleness=task.staleness,
        chosen=task.chosen,
    )
    if (agreed := context.agreed) is not None:
        record.download_recipe, record.upload_recipe = str(agreed.downlink.whole), str(agreed.upload)
        record.difference_recipe = str(agreed.downlink.difference or "")
    if task.phase is not events.TaskPhase.OFFERED and not task.carried:
        record.download_bytes = context.download_bytes
    if not context.local.plain:
        record.local_model.CopyFrom(local_task_to_proto(context.local))
    if context.choice is not None:
        record.prediction.CopyFrom(prediction_to_proto(context.choice))
    if context.report is not None:
        _add_report(record, context.report, round_.commit_s)
        record.weight, record.scale = context.weight or 0.0, context.scale or 0.0
        record.distance = context.distance or 0.0
    return record


def _add_report(record: TaskRecord, report: Report, commit_s: float) -> None:
    record.example_count = report.example_count
    record.steps = report.steps
    record.metrics.update(report.metrics)
    record.evaluation_metrics.update(report.evaluation_metrics)
    record.timings.CopyFrom(timings_to_proto(replace(report.timings, global_s=commit_s)))
    record.upload_bytes = report.upload_bytes
    record.peak_memory_bytes = report.peak_memory_bytes
    record.tensor_bytes = report.tensor_bytes
    record.merged_updates = report.merged_updates
    record.unchanged = report.unchanged
    record.noise_ratio = report.noise_ratio


def agreed_from_proto(record: TaskRecord) -> Agreed | None:
    """Return what was agreed on for a task; None where its record has no recipes that are known here."""
    try:
        whole, upload = Recipe.parse(record.download_recipe), Recipe.parse(record.upload_recipe)
        difference = Recipe.parse(record.difference_recipe) if record.difference_recipe else None
    except UsageError:
        return None
    return Agreed(Downlink(whole, difference), upload)

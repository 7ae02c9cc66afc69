"""What came with an update besides its tensors, checked, and the round's record made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedgrpc import claims
from fedgrpc.aggregation.admission import AdmissionPolicy, check_counts
from fedgrpc.aggregator.local_models import LocalTask
from fedgrpc.errors import UpdateRefused
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.records import (
    Timings,
    jump_to_proto,
    metrics_from_proto,
    timings_from_proto,
    timings_to_proto,
)
from fedgrpc.rounds import events
from fedgrpc.rounds.policy import Dominance, dominant
from fedgrpc.rounds.round import Round
from fedgrpc.rounds.state import time_left
from fedgrpc.rounds.task import Task
from fedgrpc.rounds.version import Jump
from fedgrpc.storage.run_store import TaskRow
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from fedgrpc.v1.round_pb2 import (
    TASK_KIND_TRAIN,
    LossCause,
    Prediction,
    RoundPhase,
    TaskKind,
    TaskPhase,
    TaskRecord,
)
from fedgrpc.v1.round_pb2 import Round as RoundRecord

_PLAIN = LocalTask()


@dataclass(frozen=True)
class Report:
    """One worker's account of its task; counts of examples, scores by name, sizes in bytes.

    `merged_updates`: of how many updates this is the mean, with the summed `weight`, and what the steps of one
    amount to in the mean (`accumulated_steps`, 0: not told); 0: it is a worker's own. `unchanged`: the worker says
    that training left the model as it was.
    """

    example_count: int
    steps: int
    metrics: Mapping[str, float]
    evaluation_metrics: Mapping[str, float]
    evaluation_example_count: int
    timings: Timings
    upload_bytes: int
    peak_memory_bytes: int
    merged_updates: int = 0
    weight: float = 0.0
    tensor_bytes: int = 0
    accumulated_steps: float = 0.0
    unchanged: bool = False
    scores_of_sub_models: bool = False
    scores_not_finite: frozenset[str] = frozenset()

    @classmethod
    def of(cls, header: UpdateHeader, policy: AdmissionPolicy) -> Report:
        """Read a header. Raises `UpdateRefused` and `LayoutError`."""
        metrics = metrics_from_proto(header.metrics)
        evaluation_metrics = metrics_from_proto(header.evaluation_metrics)
        check_counts(header.example_count, {**metrics, **evaluation_metrics}, policy)
        if header.merged_updates and not 0 < header.weight <= policy.max_example_count:
            raise UpdateRefused(f"the summed weight {header.weight:g} is not from above 0 to the bound")
        # Where it decides, `check_steps` holds it against the plan.
        accumulated_steps = claims.ACCUMULATED_STEPS.clamped(header.accumulated_steps)
        return cls(
            claims.EXAMPLES.checked(header.example_count),
            claims.STEPS.checked(header.steps),
            metrics,
            evaluation_metrics,
            claims.EXAMPLES.checked(header.evaluation_example_count),
            timings_from_proto(header.timings),
            header.manifest.size_bytes,
            claims.MEMORY_BYTES.clamped(header.peak_memory_bytes),
            claims.MERGED_UPDATES.checked(header.merged_updates),
            claims.WEIGHT.checked(header.weight) if header.merged_updates else 0.0,
            claims.MEMORY_BYTES.clamped(header.tensor_bytes),
            accumulated_steps if header.merged_updates else 0.0,
            header.unchanged,
            header.scores_of_sub_models,
            frozenset(metrics_from_proto(dict.fromkeys(header.scores_not_finite, 0.0))),
        )

    def uploaded_in(self, seconds: float) -> Report:
        """This report with T_upload as the aggregator saw it: from the first byte to the last."""
        return replace(self, timings=replace(self.timings, upload_s=seconds))


@dataclass
class CurrentRound:
    """The round in progress: its pure state, and what the shell knows of it. `started_at` is wall time, seconds.

    `download_bytes` are by sub-model ("" is the whole model), `offered_bytes` by worker. `local_tasks`,
    `predictions` and `recipes` (of download and upload) are by token.
    `due_at`, by the clock of `state`: until when an aggregator above waits; None: there is none. `earlier_s`: how
    long the round was open in former processes, by the wall clock, which alone outlives one.
    """

    state: Round
    kind: TaskKind
    base_version: int
    started_at: float
    download_bytes: dict[str, int] = field(default_factory=dict)
    offered_bytes: dict[str, int] = field(default_factory=dict)
    local_tasks: dict[str, LocalTask] = field(default_factory=dict)
    predictions: dict[str, Prediction] = field(default_factory=dict)
    recipes: dict[str, tuple[str, str]] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    device_classes: dict[str, str] = field(default_factory=dict)
    training_metrics: dict[str, float] = field(default_factory=dict)
    jump: Jump = Jump.NONE
    global_s: float = 0.0
    due_at: float | None = None
    earlier_s: float = 0.0
    _told: dict[str, tuple[tuple[object, ...], TaskRecord]] = field(default_factory=dict, init=False, repr=False)

    def local_task(self, token: str) -> LocalTask:
        """What the worker of a task makes of the model; the default is nothing."""
        return self.local_tasks.get(token, _PLAIN)

    def keeps(self, token: str, name: str) -> bool:
        """Whether the worker of a task keeps the tensor of that name to itself."""
        return self.local_task(token).plan.is_personal(name)

    def pulled_bytes(self, token: str) -> int:
        """Bytes of the model that the worker of a task is to pull."""
        usual_bytes = self.download_bytes.get(self.local_task(token).sub_model.name, 0)
        return self.offered_bytes.get(self.state.tasks[token].worker, usual_bytes)

    def version_of(self, token: str) -> int:
        """The version that the worker of a task was given."""
        return self.base_version - self.state.find(token).staleness

    @property
    def dominance(self) -> Dominance | None:
        """The worker that is more than half of the mean, once the weights are known."""
        if self.kind != TASK_KIND_TRAIN:
            return None
        weights: dict[str, float] = {}
        for token, weight in self.weights.items():
            worker = self.state.tasks[token].worker
            weights[worker] = weights.get(worker, 0.0) + weight
        return dominant(weights)

    def rows(self, state: Round) -> list[TaskRow]:
        """The tasks as they are stored, as they stand in `state`."""
        return [
            TaskRow(
                token,
                state.number,
                task.slot,
                task.worker,
                task.phase,
                task.reason,
                task.staleness,
                task.chosen,
                self.local_task(token).to_bytes(),
                task.loss_cause,
            )
            for token, task in state.tasks.items()
        ]

    def record(self, now: float) -> RoundRecord:
        """The round as operators see it, `now` by the clock of `state`: a wall clock may be set meanwhile."""
        state = self.state
        record = RoundRecord(
            number=state.number,
            phase=RoundPhase.Name(state.phase.value),
            base_version=self.base_version,
            committed_version=state.version or 0,
            reason=state.reason,
            tasks=[self._told_of(token, task) for token, task in state.tasks.items()],
            duration_seconds=self.earlier_s + now - state.opened_at,
            training_metrics=self.training_metrics,
            kind=self.kind,
            deadline_reason=state.deadline_reason,
        )
        if self.jump is not Jump.NONE:
            record.jump = jump_to_proto(self.jump)
        if (dominance := self.dominance) is not None:
            record.dominance.worker, record.dominance.share = dominance.worker, dominance.share
        if state.deadline_at is not None:
            record.deadline.CopyFrom(duration_to_proto(state.deadline_s))
        if state.granted_s:
            record.reconnect_grace.CopyFrom(duration_to_proto(state.granted_s))
        record.started_at.FromNanoseconds(int(self.started_at * 1e9))
        left_s = time_left(state, now)
        if left_s is not None and not state.phase.final:
            record.time_left.CopyFrom(duration_to_proto(left_s))
        return record

    def _told_of(self, token: str, task: Task) -> TaskRecord:
        """The record of a task, as it was told last where nothing of it has changed: who watches asks often."""
        report, weight, scale = self.reports.get(token), self.weights.get(token), self.scales.get(token)
        known = task, report, weight, scale, self.global_s, self.offered_bytes.get(task.worker)
        told = self._told.get(token)
        if told is None or told[0] != known:
            told = self._told[token] = known, self._task(token, task)
        return told[1]

    def _task(self, token: str, task: Task) -> TaskRecord:
        record = TaskRecord(
            worker=task.worker,
            kind=self.kind,
            phase=TaskPhase.Name(task.phase.value),
            reason=task.reason,
            loss_cause=LossCause.Name(task.loss_cause.value),
            progress=task.fraction,
            device_class=self.device_classes.get(task.worker, ""),
            staleness=task.staleness,
            chosen=task.chosen,
        )
        local = self.local_task(token)
        record.download_recipe, record.upload_recipe = self.recipes.get(token, ("", ""))
        if task.phase is not events.TaskPhase.OFFERED and not task.carried:
            record.download_bytes = self.pulled_bytes(token)
        if not local.plain:
            record.local_model.CopyFrom(local.to_proto())
        if token in self.predictions:
            record.prediction.CopyFrom(self.predictions[token])
        if report := self.reports.get(token):
            record.example_count = report.example_count
            record.steps = report.steps
            record.weight = self.weights.get(token, 0.0)
            record.scale = self.scales.get(token, 0.0)
            record.metrics.update(report.metrics)
            record.evaluation_metrics.update(report.evaluation_metrics)
            timings = replace(report.timings, global_s=self.global_s)
            record.timings.CopyFrom(timings_to_proto(timings))
            record.upload_bytes = report.upload_bytes
            record.peak_memory_bytes = report.peak_memory_bytes
            record.tensor_bytes = report.tensor_bytes
            record.merged_updates = report.merged_updates
            record.unchanged = report.unchanged
        return record

"""Records that a `Client` returns: runs, rounds, tasks, devices and versions of models, as frozen dataclasses.

The rule: times are in UTC, durations in seconds, sizes in bytes; None is unknown. Phases, states and roles are
words in lower case. A later release may add fields at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from fedgrpc.api.rows import Rows
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, models_pb2, round_pb2


@dataclass(frozen=True)
class Run:
    """A run. `rounds`: how many it has; None: it has no last one. `phase`: running, paused, finished or stopped.

    `metrics` are the newest scores of its latest version that has some. `reason`: why it has ended, or has paused
    itself.
    """

    name: str
    id: str
    phase: str
    reason: str
    round: int
    rounds: int | None
    version: int
    metrics: Mapping[str, float]
    started_at: datetime
    task: str
    model: str
    requires: str
    priority: int
    quota: int | None
    eligible_devices: int
    busy_devices: int

    @property
    def ended(self) -> bool:
        """True once it has no further rounds."""
        return self.phase in ("finished", "stopped")


@dataclass(frozen=True)
class Task:
    """One device's share of a round. `seconds` by part: download, local, upload and global."""

    device: str
    kind: str
    phase: str
    reason: str
    examples: int
    steps: int
    weight: float
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    download_bytes: int
    upload_bytes: int
    peak_memory_bytes: int
    device_class: str


@dataclass(frozen=True)
class Round:
    """A round. `version`: the model that it wrote; None: none yet.

    `metrics` are scores of that version by devices, `evaluator_metrics` by evaluators; `training_metrics` are what
    devices say of their training. `updates` counts the tasks that were accepted.
    """

    number: int
    kind: str
    phase: str
    reason: str
    base_version: int
    version: int | None
    started_at: datetime
    duration_s: float
    updates: int
    metrics: Mapping[str, float]
    evaluator_metrics: Mapping[str, float]
    training_metrics: Mapping[str, float]
    download_bytes: int
    upload_bytes: int
    tasks: Rows[Task]


@dataclass(frozen=True)
class Device:
    """A device that has registered, and how it is now. `state`: idle, busy or away. `run`: whose task it holds."""

    name: str
    role: str
    state: str
    run: str
    last_seen_s: float
    selected: int
    accepted: int
    device_class: str
    cpu_cores: int | None
    memory_bytes: int | None
    accelerator: str
    software_version: str
    labels: Mapping[str, str]
    eligible_for: tuple[str, ...]
    endings: Mapping[str, int]


@dataclass(frozen=True)
class ModelVersion:
    """A version of a run's model that is kept, with its scores by devices and by evaluators."""

    run: str
    version: int
    round: int
    trained_rounds: int
    size_bytes: int
    sha256: str
    tags: tuple[str, ...]
    best: bool
    latest: bool
    written_at: datetime
    metrics: Mapping[str, float]
    evaluator_metrics: Mapping[str, float]


def run_of(message: pb.RunSummary) -> Run:
    """Return the record of a message; so do the other functions here."""
    return Run(
        name=message.name,
        id=message.id,
        phase=_word(pb.RunPhase, message.phase),
        reason=message.reason,
        round=message.current_round,
        rounds=message.total_rounds or None,
        version=message.model_version,
        metrics=_frozen(message.metrics),
        started_at=_time(message.started_at),
        task=message.learning_task,
        model=message.model,
        requires=message.requires,
        priority=message.priority,
        quota=message.quota or None,
        eligible_devices=message.eligible_workers,
        busy_devices=message.busy_workers,
    )


def round_of(message: round_pb2.Round) -> Round:
    """See `run_of`."""
    tasks = Rows(map(task_of, message.tasks))
    return Round(
        number=message.number,
        kind=_word(round_pb2.TaskKind, message.kind),
        phase=_word(round_pb2.RoundPhase, message.phase),
        reason=message.reason,
        base_version=message.base_version,
        version=message.committed_version or None,
        started_at=_time(message.started_at),
        duration_s=message.duration_seconds,
        updates=sum(task.phase == "accepted" for task in tasks),
        metrics=_frozen(message.metrics),
        evaluator_metrics=_frozen(message.evaluator_metrics),
        training_metrics=_frozen(message.training_metrics),
        download_bytes=sum(task.download_bytes for task in tasks),
        upload_bytes=sum(task.upload_bytes for task in tasks),
        tasks=tasks,
    )


def task_of(message: round_pb2.TaskRecord) -> Task:
    """See `run_of`."""
    parts = ("download", "local", "upload", "global")
    return Task(
        device=message.worker,
        kind=_word(round_pb2.TaskKind, message.kind),
        phase=_word(round_pb2.TaskPhase, message.phase),
        reason=message.reason,
        examples=message.example_count,
        steps=message.steps,
        weight=message.weight,
        metrics=_frozen(message.metrics),
        seconds=MappingProxyType({part: getattr(message.timings, f"{part}_seconds") for part in parts}),
        download_bytes=message.download_bytes,
        upload_bytes=message.upload_bytes,
        peak_memory_bytes=message.peak_memory_bytes,
        device_class=message.device_class,
    )


def device_of(message: pb.WorkerRecord) -> Device:
    """See `run_of`."""
    device = message.device
    return Device(
        name=message.worker,
        role=_word(device_pb2.WorkerRole, message.role),
        state=_word(pb.WorkerState, message.state),
        run=message.run,
        last_seen_s=duration_from_proto(message.last_seen_ago),
        selected=message.rounds_selected,
        accepted=message.rounds_accepted,
        device_class=device.device_class,
        cpu_cores=device.cpu_cores or None,
        memory_bytes=device.memory_bytes or None,
        accelerator=device.accelerator,
        software_version=device.software_version,
        labels=_frozen(device.labels),
        eligible_for=tuple(message.eligible_for),
        endings=_frozen(message.endings),
    )


def version_of(run: str, message: models_pb2.VersionRecord) -> ModelVersion:
    """See `run_of`."""
    version = message.version
    return ModelVersion(
        run=run,
        version=version.version,
        round=version.round,
        trained_rounds=version.trained_rounds,
        size_bytes=message.size_bytes,
        sha256=version.sha256.hex(),
        tags=tuple(message.tags),
        best=message.best,
        latest=message.latest,
        written_at=_time(message.written_at),
        metrics=_frozen(version.metrics),
        evaluator_metrics=_frozen(version.evaluator_metrics),
    )


def _word(enum: Any, value: int) -> str:
    """Return the name of an enum's value without that of the enum: RUN_PHASE_PAUSED is paused."""
    try:
        name: str = enum.Name(value)
    except ValueError:
        # An aggregator of a later release may have more.
        return f"unknown ({value})"
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).replace("_", "-").lower()


def _frozen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(sorted(values.items())))


def _time(message: Any) -> datetime:
    found: datetime = message.ToDatetime(tzinfo=UTC)
    return found

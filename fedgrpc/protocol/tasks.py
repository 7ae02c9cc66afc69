"""A worker's registration and tasks: the aggregator's answers to workers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

from fedgrpc import claims
from fedgrpc.codec.chunk import CHUNK_BYTES
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.protocol.plans import (
    local_model_from_proto,
    local_task_to_proto,
    training_plan_from_proto,
    training_plan_to_proto,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import WHOLE_MODEL, LocalModelPlan
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2

_SHORTEST_INTERVAL_S: Final = 0.05


class WorkerRole(IntEnum):
    """A worker's part in the run; numbers as in `fedgrpc.v1.WorkerRole`."""

    TRAINER = device_pb2.WORKER_ROLE_TRAINER
    EVALUATOR = device_pb2.WORKER_ROLE_EVALUATOR
    AGGREGATOR = device_pb2.WORKER_ROLE_AGGREGATOR


@dataclass(frozen=True)
class Registration:
    """The aggregator's answer to `Register`, or what holds for another of its runs. Seconds and bytes.

    `own`: it is the run that the aggregator was started with. `run_id` "": there is none, and the aggregator tells
    of each run when it has work of it. `without_metrics`: the device tells nothing of its data but updates.
    """

    run: str
    poll_wait_s: float
    heartbeat_interval_s: float
    lease_s: float
    max_chunk_bytes: int
    max_payload_bytes: int
    learning_task: str = ""
    model: str = ""
    run_id: str = ""
    describe_model: bool = False
    tell_channels: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    own: bool = True
    without_metrics: bool = False


@dataclass(frozen=True)
class Task:
    """One worker's share of one round.

    `deadline_s` is a time of this process's clock, of a worker the monotonic one. `evaluate` asks for scores of
    the given model before training. `local_model` is what to make of that model first. `uplink_bytes_per_second`
    is the rate of the worker's link, 0 if the aggregator does not know it. `clip_norm`: the longest difference
    that the device sends; without `metrics` it reports none.
    """

    token: str
    run: str
    round: int
    kind: TaskKind
    model_version: int
    plan: TrainingPlan
    upload_recipe: str
    run_id: str
    deadline_s: float | None = None
    uplink_bytes_per_second: float = 0.0
    seed: int = 0
    evaluate: bool = False
    local_model: LocalModelPlan | None = None
    sub_model: SubModel = field(default_factory=SubModel)
    clip_norm: float | None = None
    metrics: bool = True

    @property
    def is_personal(self) -> Callable[[str], bool]:
        """True if the tensor of a name stays on the device."""
        return (self.local_model or WHOLE_MODEL).is_personal

    @property
    def is_kept_back(self) -> Callable[[str], bool]:
        """True if the update lacks the tensor of a name."""
        return (self.local_model or WHOLE_MODEL).is_kept_back

    @property
    def training_ends_s(self) -> float | None:
        """Time by the same clock at which training ends, for the update to come in time. None: no such time."""
        reserve_s = self.plan.upload_reserve_s
        return None if self.deadline_s is None or reserve_s is None else self.deadline_s - reserve_s


def registration_from_proto(message: aggregator_pb2.RegisterResponse) -> Registration:
    """Return a registration. Without an interval the worker still does not poll in a tight loop."""
    heartbeat_s = duration_from_proto(message.heartbeat_interval)
    return Registration(
        run=message.run,
        poll_wait_s=duration_from_proto(message.poll_wait),
        heartbeat_interval_s=max(_SHORTEST_INTERVAL_S, heartbeat_s) if heartbeat_s else 5.0,
        lease_s=duration_from_proto(message.lease),
        max_chunk_bytes=message.max_chunk_bytes or CHUNK_BYTES,
        max_payload_bytes=message.max_payload_bytes or 4 << 30,
        learning_task=message.learning_task,
        model=message.model,
        run_id=message.run_id or message.run,
        describe_model=message.describe_model,
        tell_channels=message.tell_channels,
        options=dict(message.options),
        without_metrics=message.without_metrics,
    )


def registration_of(known: Registration, terms: aggregator_pb2.RunTerms) -> Registration:
    """Return what holds for the run of these terms with the aggregator that answered `known`."""
    return replace(
        known,
        run=terms.run,
        run_id=terms.run_id or terms.run,
        learning_task=terms.learning_task,
        model=terms.model,
        describe_model=True,
        tell_channels=terms.tell_channels,
        options=dict(terms.options),
        own=False,
        without_metrics=terms.without_metrics,
    )


def task_to_proto(task: Task, now_s: float) -> aggregator_pb2.Task:
    """Return the message of a task; `now_s` is of the clock of its deadline."""
    message = aggregator_pb2.Task(
        token=task.token,
        run=task.run,
        round=task.round,
        kind=round_pb2.TaskKind.Name(task.kind),
        model_version=task.model_version,
        plan=training_plan_to_proto(task.plan),
        upload_recipe=task.upload_recipe,
        run_id=task.run_id,
        uplink_bytes_per_second=task.uplink_bytes_per_second,
        seed=task.seed,
        evaluate=task.evaluate,
    )
    if task.deadline_s is not None:
        message.time_left.CopyFrom(duration_to_proto(max(0.0, task.deadline_s - now_s)))
    local = LocalTask(task.local_model or WHOLE_MODEL, task.sub_model)
    if not local.plain:
        message.local_model.CopyFrom(local_task_to_proto(local))
    if task.clip_norm is not None:
        message.privacy.clip_norm, message.privacy.without_metrics = task.clip_norm, not task.metrics
    return message


def task_from_proto(message: aggregator_pb2.Task) -> Task:
    """Return a task. Raises `LayoutError` for an unknown kind, a plan that cannot be kept, and absurd numbers."""
    try:
        kind = TaskKind(message.kind)
    except ValueError:
        raise LayoutError(f"unknown kind of task {message.kind}; update fedgrpc on this device") from None
    deadline_s = None
    if message.HasField("time_left"):
        deadline_s = time.monotonic() + duration_from_proto(message.time_left)
    local_model, sub_model = local_model_from_proto(message.local_model)
    clip_norm = message.privacy.clip_norm if message.HasField("privacy") else None
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise LayoutError(f"the clip norm of a task is a number above 0, not {clip_norm:g}")
    return Task(
        token=message.token,
        run=message.run,
        round=claims.NUMBER.checked(message.round),
        kind=kind,
        model_version=claims.NUMBER.checked(message.model_version),
        plan=training_plan_from_proto(message.plan),
        upload_recipe=message.upload_recipe,
        run_id=message.run_id or message.run,
        deadline_s=deadline_s,
        uplink_bytes_per_second=rate if 0 < (rate := message.uplink_bytes_per_second) < math.inf else 0.0,
        seed=message.seed,
        evaluate=message.evaluate,
        local_model=None if local_model.plain else local_model,
        sub_model=sub_model,
        clip_norm=clip_norm,
        metrics=not message.privacy.without_metrics,
    )

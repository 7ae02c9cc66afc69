"""What the aggregator tells a worker: registration, tasks and plans, as values."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from fedgrpc import claims
from fedgrpc.codec.chunk import CHUNK_BYTES
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.plans import compression_from_proto, sub_model_from_proto
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import CompressionPlan
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2

_SHORTEST_INTERVAL_S: Final = 0.05
_PLAN_NUMBERS: Final = ("epochs", "learning_rate", "momentum", "proximal_mu", "label_adjustment")
# No training is meant by what is above, and steps counted from it would overflow.
_LARGEST_PLAN_NUMBER: Final = 1e9


class Role(IntEnum):
    """What a worker does in the run; numbers as in `fedgrpc.v1.WorkerRole`."""

    TRAINER = device_pb2.WORKER_ROLE_TRAINER
    EVALUATOR = device_pb2.WORKER_ROLE_EVALUATOR
    AGGREGATOR = device_pb2.WORKER_ROLE_AGGREGATOR


class TaskKind(IntEnum):
    """What a task asks for; numbers as in `fedgrpc.v1.TaskKind`."""

    TRAIN = round_pb2.TASK_KIND_TRAIN
    EVALUATE = round_pb2.TASK_KIND_EVALUATE
    INITIALIZE = round_pb2.TASK_KIND_INITIALIZE


class Phase(IntEnum):
    """Where the worker is with a task; numbers as in `fedgrpc.v1.TaskPhase`."""

    DOWNLOADING = round_pb2.TASK_PHASE_DOWNLOADING
    TRAINING = round_pb2.TASK_PHASE_TRAINING
    UPLOADING = round_pb2.TASK_PHASE_UPLOADING


@dataclass(frozen=True)
class Registration:
    """The aggregator's answer to `Register`. Times in seconds, sizes in bytes."""

    run: str
    poll_wait_s: float
    heartbeat_interval_s: float
    lease_s: float
    max_chunk_bytes: int
    max_payload_bytes: int
    learning_task: str = ""
    model: str = ""
    run_id: str = ""


@dataclass(frozen=True)
class Plan:
    """How to train. None leaves the choice to the learning task."""

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    proximal_mu: float = 0.0
    label_adjustment: float = 0.0
    seed: int = 0
    evaluate: bool = False
    compression: CompressionPlan | None = None
    sub_model: SubModel = field(default_factory=SubModel)
    tell_channels: bool = False
    upload_reserve_s: float | None = None


@dataclass(frozen=True)
class Task:
    """One worker's share of one round. `deadline_s` is of this process's monotonic clock; None: there is none.

    `uplink_bytes_per_second`: what the aggregator knows of this worker's link; 0: nothing.
    """

    token: str
    run: str
    round: int
    kind: TaskKind
    model_version: int
    plan: Plan
    download_recipe: str
    upload_recipe: str
    run_id: str
    deadline_s: float | None = None
    uplink_bytes_per_second: float = 0.0

    @property
    def training_ends_s(self) -> float | None:
        """When training is to end so that the update comes in time, by the same clock; None: when it is done."""
        reserve_s = self.plan.upload_reserve_s
        return None if self.deadline_s is None or reserve_s is None else self.deadline_s - reserve_s


def registration_from_proto(message: aggregator_pb2.RegisterResponse) -> Registration:
    """Read it with sane bounds: an aggregator that tells no interval is not polled in a tight loop."""
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
    )


def task_from_proto(message: aggregator_pb2.Task) -> Task:
    """Raises LayoutError for a kind of task or a plan that this version does not know, and for numbers that no run
    comes to.
    """
    try:
        kind = TaskKind(message.kind)
    except ValueError:
        raise LayoutError(f"unknown kind of task {message.kind}; update fedgrpc on this device") from None
    deadline_s = None
    if message.HasField("time_left"):
        deadline_s = time.monotonic() + duration_from_proto(message.time_left)
    return Task(
        token=message.token,
        run=message.run,
        round=claims.NUMBER.checked(message.round),
        kind=kind,
        model_version=claims.NUMBER.checked(message.model_version),
        plan=plan_from_proto(message.plan),
        download_recipe=message.download_recipe,
        upload_recipe=message.upload_recipe,
        run_id=message.run_id or message.run,
        deadline_s=deadline_s,
        uplink_bytes_per_second=rate if 0 < (rate := message.uplink_bytes_per_second) < math.inf else 0.0,
    )


def plan_from_proto(message: round_pb2.Plan) -> Plan:
    """Zero on the wire is None here. Raises LayoutError for numbers and a local model that cannot be."""
    for name in _PLAN_NUMBERS:
        value = getattr(message, name)
        if not 0 <= value <= _LARGEST_PLAN_NUMBER:
            raise LayoutError(f"the plan's {name} is {value:g}; it must be from 0 to {_LARGEST_PLAN_NUMBER:g}")
    compression = compression_from_proto(message.local_model)
    return Plan(
        epochs=claims.FACTOR.checked(message.epochs) or None,
        max_steps=message.max_steps or None,
        batch_size=message.batch_size or None,
        learning_rate=claims.FACTOR.checked(message.learning_rate) or None,
        momentum=claims.FACTOR.checked(message.momentum) or None,
        proximal_mu=claims.FACTOR.checked(message.proximal_mu),
        label_adjustment=claims.FACTOR.checked(message.label_adjustment),
        seed=message.seed,
        evaluate=message.evaluate,
        compression=None if compression.plain else compression,
        sub_model=sub_model_from_proto(message.local_model),
        tell_channels=message.tell_channels,
        upload_reserve_s=(
            duration_from_proto(message.upload_reserve) if message.HasField("upload_reserve") else None
        ),
    )

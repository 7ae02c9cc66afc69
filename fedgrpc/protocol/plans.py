"""A run's terms on the wire: policy of rounds, training plan, local models of devices and the table of those.

Policy and training plan mirror a dataclass. The rule: a field has one name on both sides. Only times differ:
`NAME_s`, in seconds, is the `Duration` `NAME`. Each `*_from_proto` of a plan raises `LayoutError` for one that no
worker could keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.message import Message

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import (
    WHOLE_MODEL,
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Memory,
    Pruning,
    Quantization,
)
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2

_SECONDS: Final = "_s"
_LATE: Final = {"discard": round_pb2.LATE_POLICY_DISCARD, "carry": round_pb2.LATE_POLICY_CARRY}
_MOST: Final = (1 << 64) - 1
_ALL = ("*",)
_MAX_SUB_MODEL_CHARS = 200


def fill(message: Message, values: Mapping[str, Any]) -> None:
    """Set the fields of `values` in `message`; None stays absent."""
    for name, value in values.items():
        if value is None:
            continue
        if name.endswith(_SECONDS):
            getattr(message, name.removesuffix(_SECONDS)).CopyFrom(duration_to_proto(value))
        else:
            setattr(message, name, value)


def values_of(message: Message, owner: type) -> dict[str, Any]:
    """Return the fields of the dataclass `owner` that `message` has, by name; the others are for its defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(owner):
        name = field.name.removesuffix(_SECONDS)
        if message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        values[field.name] = value if name == field.name else duration_from_proto(value)
    return values


def policy_to_proto(policy: RoundPolicy) -> round_pb2.RoundPolicy:
    """Return the message of a policy. Numbers that a message cannot hold are cut."""
    message = round_pb2.RoundPolicy()
    fill(message, {name: _sendable(value) for name, value in vars(policy).items()})
    return message


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return _LATE[value]
    return min(value, _MOST) if isinstance(value, int) else value


def policy_from_proto(message: round_pb2.RoundPolicy) -> RoundPolicy:
    """Return the policy of a message. Raises `UsageError` for one that cannot be, as `RoundPolicy` does."""
    late = "carry" if message.late == round_pb2.LATE_POLICY_CARRY else "discard"
    return RoundPolicy(**values_of(message, RoundPolicy) | {"late": late})


def training_plan_to_proto(plan: TrainingPlan) -> round_pb2.TrainingPlan:
    """Return the message of a plan. What is left to the learning task is absent."""
    message = round_pb2.TrainingPlan()
    fill(message, vars(plan))
    return message


def training_plan_from_proto(message: round_pb2.TrainingPlan) -> TrainingPlan:
    """Return the plan of a message."""
    try:
        return TrainingPlan(**values_of(message, TrainingPlan))
    except UsageError as error:
        raise LayoutError(f"the training plan cannot be kept: {error}") from error


def local_model_to_proto(plan: LocalModelPlan, sub_model: SubModel) -> round_pb2.LocalModel:
    """Return the message of a device's local model."""
    message = round_pb2.LocalModel(
        sub_model=sub_model.name,
        personal_layers=plan.personal_layers,
        nested_widths=plan.nested,
        trained_layers=() if plan.trained_layers == _ALL else plan.trained_layers,
        distillation=plan.distillation,
    )
    if part := plan.pruning:
        across = part.scope == "global"
        message.pruning.CopyFrom(round_pb2.Pruning(ratio=part.ratio, across_layers=across, layers=part.layers))
    if plan.clustering:
        clusters, layers = plan.clustering.clusters, plan.clustering.layers
        message.clustering.CopyFrom(round_pb2.Clustering(clusters=clusters, layers=layers))
    if plan.quantization:
        quantization = plan.quantization
        message.quantization.CopyFrom(
            round_pb2.Quantization(
                weight_bits=quantization.weight_bits,
                activation_bits=quantization.activation_bits,
                layers=quantization.layers,
            )
        )
    if plan.arithmetic:
        arithmetic = plan.arithmetic
        message.arithmetic.CopyFrom(
            round_pb2.Arithmetic(
                format=arithmetic.format,
                stochastic_rounding=arithmetic.rounding == "stochastic",
                emulated=arithmetic.emulated,
                loss_scale=arithmetic.loss_scale,
                dynamic_loss_scale=arithmetic.dynamic_loss_scale,
                float32_copy=arithmetic.float32_copy,
                accumulate_in_format=arithmetic.accumulate == "format",
            )
        )
    if memory := plan.memory:
        message.memory.CopyFrom(
            round_pb2.Memory(
                micro_batches=memory.micro_batches,
                checkpoint=memory.checkpoint,
                no_momentum=not memory.momentum,
            )
        )
    return message


def parse_sub_model(text: str) -> SubModel:
    """Return the sub-model of a text: "" or what `str` gave. Raises `LayoutError`."""
    if len(text) > _MAX_SUB_MODEL_CHARS:
        raise LayoutError(f"a sub-model of {len(text)} characters; allowed are {_MAX_SUB_MODEL_CHARS}")
    try:
        return SubModel.parse(text)
    except UsageError as error:
        raise LayoutError(str(error)) from error


def local_model_from_proto(message: round_pb2.LocalModel) -> tuple[LocalModelPlan, SubModel]:
    """Return the plan, without the sub-model's width and rule, and the sub-model."""
    if not message.ByteSize():
        return WHOLE_MODEL, parse_sub_model(message.sub_model)
    try:
        plan = LocalModelPlan(
            personal_layers=tuple(message.personal_layers),
            pruning=_pruning(message.pruning) if message.HasField("pruning") else None,
            clustering=Clustering(message.clustering.clusters, tuple(message.clustering.layers) or _ALL)
            if message.HasField("clustering")
            else None,
            quantization=_quantization(message.quantization) if message.HasField("quantization") else None,
            arithmetic=_arithmetic(message.arithmetic) if message.HasField("arithmetic") else None,
            nested=tuple(message.nested_widths),
            trained_layers=tuple(message.trained_layers) or _ALL,
            memory=_memory(message.memory) if message.HasField("memory") else None,
            distillation=message.distillation,
        )
    except UsageError as error:
        raise LayoutError(f"the plan cannot be kept: {error}") from error
    return plan, parse_sub_model(message.sub_model)


def local_task_to_proto(local: LocalTask) -> round_pb2.LocalModel:
    """Return the message of a task's local model."""
    return local_model_to_proto(local.plan, local.sub_model)


def local_task_from_proto(message: round_pb2.LocalModel) -> LocalTask:
    """Return a task's local model."""
    return LocalTask(*local_model_from_proto(message))


def local_model_plan_from_proto(message: round_pb2.LocalModel) -> LocalModelPlan:
    """Return the whole plan, the sub-model's width and rule too."""
    plan, sub_model = local_model_from_proto(message)
    return plan.with_sub_model(sub_model)


def _pruning(message: round_pb2.Pruning) -> Pruning:
    scope = "global" if message.across_layers else "layer"
    return Pruning(message.ratio, scope, tuple(message.layers) or _ALL)


def _quantization(message: round_pb2.Quantization) -> Quantization:
    return Quantization(message.weight_bits, message.activation_bits, tuple(message.layers) or _ALL)


def _arithmetic(message: round_pb2.Arithmetic) -> Arithmetic:
    rounding = "stochastic" if message.stochastic_rounding else "nearest"
    return Arithmetic(
        message.format or "float32",
        rounding,
        message.emulated,
        message.loss_scale or 1.0,
        message.dynamic_loss_scale,
        message.float32_copy,
        "format" if message.accumulate_in_format else "carrier",
    )


def _memory(message: round_pb2.Memory) -> Memory:
    return Memory(message.micro_batches or 1, message.checkpoint, not message.no_momentum)


def plan_table_to_proto(plans: PlanTable) -> round_pb2.LocalModels:
    """Return the message of plans by device class."""
    return round_pb2.LocalModels(
        default=_plan_to_proto(plans.default),
        classes={name: _plan_to_proto(plan) for name, plan in plans.classes.items()},
        automatic=[_plan_to_proto(plan) for plan in plans.automatic],
    )


def plan_table_from_proto(message: round_pb2.LocalModels) -> PlanTable:
    """Return the plans by device class of a message."""
    return PlanTable(
        local_model_plan_from_proto(message.default),
        {name: local_model_plan_from_proto(plan) for name, plan in message.classes.items()},
        tuple(local_model_plan_from_proto(plan) for plan in message.automatic),
    )


def _plan_to_proto(plan: LocalModelPlan) -> round_pb2.LocalModel:
    return local_model_to_proto(plan, plan.sub_model(0))

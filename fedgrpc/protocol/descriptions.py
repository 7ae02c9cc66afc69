"""Description by a device of its learning task's model, before the model has any values."""

from __future__ import annotations

from dataclasses import dataclass

from fedgrpc import claims
from fedgrpc.protocol.plans import local_model_plan_from_proto, local_model_to_proto
from fedgrpc.protocol.tensors import channels_from_proto, channels_to_proto
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.v1 import aggregator_pb2


@dataclass(frozen=True)
class ModelDescription:
    """Sizes of the whole model and of the worker's process without it, bytes; 0 is unknown.

    `activation_bytes` are those that the backward pass of one batch keeps beside weights. `channels` are None
    where they were not asked for, or the model has none. `killed` is the plan in whose training the worker's
    processes were killed again and again.
    """

    model_bytes: int = 0
    process_bytes: int = 0
    activation_bytes: int = 0
    channels: ChannelMap | None = None
    killed: LocalModelPlan | None = None


def description_to_proto(worker: str, description: ModelDescription) -> aggregator_pb2.DescribeModelRequest:
    """Return the message in which `worker` sends the description."""
    message = aggregator_pb2.DescribeModelRequest(
        worker=worker,
        model_bytes=description.model_bytes,
        process_bytes=description.process_bytes,
        activation_bytes=description.activation_bytes,
    )
    if description.channels is not None:
        message.channels.CopyFrom(channels_to_proto(description.channels))
    if description.killed is not None:
        message.killed.CopyFrom(local_model_to_proto(description.killed, description.killed.sub_model(0)))
    return message


def description_from_proto(message: aggregator_pb2.DescribeModelRequest) -> ModelDescription:
    """Return the description, each number within its range. Raises `LayoutError` for what cannot be."""
    return ModelDescription(
        claims.MEMORY_BYTES.clamped(message.model_bytes),
        claims.MEMORY_BYTES.clamped(message.process_bytes),
        claims.MEMORY_BYTES.clamped(message.activation_bytes),
        channels_from_proto(message.channels) if message.HasField("channels") else None,
        local_model_plan_from_proto(message.killed) if message.HasField("killed") else None,
    )

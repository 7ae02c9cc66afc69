"""Between messages and what costs are predicted from: profiles, past tasks, predictions."""

from __future__ import annotations

from fedgrpc.aggregation.prediction import (
    Choice,
    Device,
    Observation,
    PlanSize,
    Prediction,
    bits_per_element,
)
from fedgrpc.rpc.local_model import compression_from_proto
from fedgrpc.v1 import device_pb2, round_pb2


def device_of(profile: device_pb2.DeviceProfile) -> Device:
    """What costs are predicted from, of what a device says of itself."""
    return Device(profile.memory_bytes, profile.uplink_bits_per_second, profile.downlink_bits_per_second)


def counts(task: round_pb2.TaskRecord) -> bool:
    """Whether the record tells what training costs."""
    return task.phase == round_pb2.TASK_PHASE_ACCEPTED and task.kind == round_pb2.TASK_KIND_TRAIN


def observation_of(task: round_pb2.TaskRecord, size: PlanSize) -> Observation:
    """What a task cost whose plan makes the model that size."""
    return Observation(
        size.share,
        size.weights_bytes,
        task.timings.download_seconds,
        task.timings.local_seconds,
        task.timings.upload_seconds,
        task.download_bytes,
        task.upload_bytes,
        task.peak_memory_bytes,
        task.tensor_bytes,
        bits_per_element(task.upload_bytes, size.sent_elements, compression_from_proto(task.local_model)),
    )


def prediction_to_proto(choice: Choice) -> round_pb2.Prediction:
    """As it is kept with the task."""
    its = choice.prediction
    return round_pb2.Prediction(
        download_seconds=its.download_s,
        local_seconds=its.local_s,
        upload_seconds=its.upload_s,
        peak_memory_bytes=its.peak_memory_bytes,
        reason=choice.reason,
    )


def prediction_from_proto(message: round_pb2.Prediction) -> Prediction:
    """As it was kept."""
    return Prediction(
        message.download_seconds if message.HasField("download_seconds") else None,
        message.local_seconds if message.HasField("local_seconds") else None,
        message.upload_seconds if message.HasField("upload_seconds") else None,
        message.peak_memory_bytes,
    )

"""Between messages and what costs are predicted from: profiles, past tasks, predictions.

Records are read as if a worker had written them: one did, and a data folder may be older than the ranges of today.
"""

from __future__ import annotations

from fedgrpc import claims
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
    return Device(
        claims.MEMORY_BYTES.clamped(profile.memory_bytes),
        claims.BITS_PER_SECOND.clamped(profile.uplink_bits_per_second),
        claims.BITS_PER_SECOND.clamped(profile.downlink_bits_per_second),
    )


def counts(task: round_pb2.TaskRecord) -> bool:
    """Whether the record tells what training costs."""
    return task.phase == round_pb2.TASK_PHASE_ACCEPTED and task.kind == round_pb2.TASK_KIND_TRAIN


def observation_of(task: round_pb2.TaskRecord, size: PlanSize) -> Observation:
    """What a task cost whose plan makes the model that size."""
    timings = task.timings
    upload_bytes = claims.PAYLOAD_BYTES.clamped(task.upload_bytes)
    return Observation(
        size.share,
        size.weights_bytes,
        claims.SECONDS.clamped(timings.download_seconds),
        claims.SECONDS.clamped(timings.local_seconds),
        claims.SECONDS.clamped(timings.upload_seconds),
        claims.PAYLOAD_BYTES.clamped(task.download_bytes),
        upload_bytes,
        claims.MEMORY_BYTES.clamped(task.peak_memory_bytes),
        claims.MEMORY_BYTES.clamped(task.tensor_bytes),
        bits_per_element(upload_bytes, size.sent_elements, compression_from_proto(task.local_model)),
    )


def prediction_to_proto(choice: Choice) -> round_pb2.Prediction:
    """As it is kept with the task; what is beyond all measure counts as the most there is."""
    expected = choice.prediction
    return round_pb2.Prediction(
        download_seconds=_seconds(expected.download_s),
        local_seconds=_seconds(expected.local_s),
        upload_seconds=_seconds(expected.upload_s),
        peak_memory_bytes=claims.MEMORY_BYTES.clamped(expected.peak_memory_bytes),
        reason=choice.reason,
    )


def _seconds(predicted: float | None) -> float | None:
    return None if predicted is None else claims.SECONDS.clamped(predicted)


def prediction_from_proto(message: round_pb2.Prediction) -> Prediction:
    """As it was kept."""
    return Prediction(
        _seconds(message.download_seconds) if message.HasField("download_seconds") else None,
        _seconds(message.local_seconds) if message.HasField("local_seconds") else None,
        _seconds(message.upload_seconds) if message.HasField("upload_seconds") else None,
        claims.MEMORY_BYTES.clamped(message.peak_memory_bytes),
    )

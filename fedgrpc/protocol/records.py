"""Records on the wire and in the database: timings, metrics, predictions and histories of workers.

Each number is brought into its range (`fedgrpc.claims`) or refused with `LayoutError`. Stored records are
read in the same way: a worker wrote them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from google.protobuf.message import DecodeError

from fedgrpc import claims
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.plans import local_model_plan_from_proto
from fedgrpc.rounds.events import LossCause
from fedgrpc.rounds.history import KEPT, LinkRates, Timing, Timings, WorkerHistory
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.submodels.cost import Observation, Prediction, errors_of
from fedgrpc.submodels.plan_choice import PlanChoice
from fedgrpc.submodels.plan_size import PlanSize, bits_per_element
from fedgrpc.v1 import device_pb2, round_pb2


def timings_to_proto(timings: Timings) -> device_pb2.Timings:
    """Return the message of timings."""
    return device_pb2.Timings(
        download_seconds=timings.download_s,
        local_seconds=timings.local_s,
        upload_seconds=timings.upload_s,
        global_seconds=timings.global_s,
    )


def timings_from_proto(message: device_pb2.Timings) -> Timings:
    """Return the timings of a message, cut at 30 years. Raises `LayoutError` for negative and endless ones."""
    parts = (message.download_seconds, message.local_seconds, message.upload_seconds, message.global_seconds)
    for seconds in parts:
        if not (math.isfinite(seconds) and seconds >= 0):
            raise LayoutError(f"a timing of {seconds} seconds cannot be")
    return Timings(*map(claims.SECONDS.clamped, parts))


def metrics_from_proto(metrics: Mapping[str, float], max_metrics: int = claims.METRICS) -> dict[str, float]:
    """Return scores by name. Raises `LayoutError` for one out of range, a bad name, and too many."""
    if len(metrics) > max_metrics:
        raise LayoutError(f"{len(metrics)} metrics are reported, allowed are {max_metrics}")
    for name, value in metrics.items():
        shown = claims.LABEL.cleaned(name)
        if not (0 < len(name) <= claims.METRIC_NAME_CHARS and name.isprintable()):
            raise LayoutError(f"a metric is called {shown!r}; a name has 1 to 64 printable characters")
        if not claims.SCORE.least <= value <= claims.SCORE.most:
            raise LayoutError(f"metric {shown!r} is {value}; a score is a number up to {claims.SCORE.most:g}")
    return dict(metrics)


def tells_cost(task: round_pb2.TaskRecord) -> bool:
    """Return whether training can be learned from the record: an accepted task of training."""
    return task.phase == round_pb2.TASK_PHASE_ACCEPTED and task.kind == round_pb2.TASK_KIND_TRAIN


def observation_from_proto(task: round_pb2.TaskRecord, size: PlanSize) -> Observation:
    """Return what a task cost, whose plan makes the model that `size`."""
    timings = task.timings
    upload_bytes = claims.PAYLOAD_BYTES.clamped(task.upload_bytes)
    plan = local_model_plan_from_proto(task.local_model)
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
        bits_per_element(upload_bytes, size.sent_elements, plan),
        plan,
        size.technique,
        claims.NOISE_RATIO.clamped(task.noise_ratio),
        size.step,
    )


def prediction_to_proto(choice: PlanChoice) -> round_pb2.Prediction:
    """Return the message of a choice and its prediction, each number in its range."""
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
    """Return the prediction of a message."""
    return Prediction(
        _seconds(message.download_seconds) if message.HasField("download_seconds") else None,
        _seconds(message.local_seconds) if message.HasField("local_seconds") else None,
        _seconds(message.upload_seconds) if message.HasField("upload_seconds") else None,
        claims.MEMORY_BYTES.clamped(message.peak_memory_bytes),
    )


def prediction_errors(task: round_pb2.TaskRecord) -> Mapping[str, float]:
    """Return the relative error of each part of an accepted task's cost that was predicted and measured."""
    timings = task.timings
    measured = Prediction(
        claims.SECONDS.clamped(timings.download_seconds),
        claims.SECONDS.clamped(timings.local_seconds),
        claims.SECONDS.clamped(timings.upload_seconds),
        claims.MEMORY_BYTES.clamped(task.peak_memory_bytes),
    )
    return errors_of(prediction_from_proto(task.prediction), measured)


def history_to_bytes(history: WorkerHistory) -> bytes:
    """Return the bytes of a history. The counts `selected` and `accepted` are columns of their own."""
    message = round_pb2.WorkerHistory(
        timings=[
            round_pb2.PastTiming(
                download_seconds=timing.download_s,
                local_seconds=timing.local_s,
                upload_seconds=timing.upload_s,
                cut=timing.cut,
            )
            for timing in history.timings
        ],
        selected_in=history.selected_in,
        loss=history.loss,
        example_count=history.example_count,
        endings=[round_pb2.LossCause.Name(cause.value) for cause in history.endings],
        uplink_bytes_per_second=history.uplink.samples,
        downlink_bytes_per_second=history.downlink.samples,
    )
    return message.SerializeToString()


def history_from_bytes(kept: bytes, selected: int, accepted: int) -> WorkerHistory:
    """Return the history of stored bytes, with every number in its range. Raises `LayoutError` for other bytes."""
    try:
        message = round_pb2.WorkerHistory.FromString(kept)
    except DecodeError as error:
        raise LayoutError(f"no history: {error}") from error
    up, down = (
        LinkRates(tuple(map(claims.BYTES_PER_SECOND.clamped, rates)))
        for rates in (message.uplink_bytes_per_second, message.downlink_bytes_per_second)
    )
    return WorkerHistory(
        timings=tuple(map(_timing, message.timings[-KEPT:])),
        selected=selected,
        accepted=accepted,
        selected_in=claims.NUMBER.clamped(message.selected_in),
        loss=claims.SCORE.clamped(message.loss) if message.HasField("loss") else None,
        example_count=claims.EXAMPLES.clamped(message.example_count),
        endings=tuple(map(_ending, message.endings[-KEPT:])),
        uplink=up,
        downlink=down,
    )


def _ending(number: int) -> LossCause:
    """Return the cause of that number; `LATE` for one that this version does not know."""
    return LossCause(number) if number in {cause.value for cause in LossCause} else LossCause.LATE


def _timing(message: round_pb2.PastTiming) -> Timing:
    def seconds(name: str) -> float | None:
        return claims.SECONDS.clamped(getattr(message, name)) if message.HasField(name) else None

    return Timing(seconds("download_seconds"), seconds("local_seconds"), seconds("upload_seconds"), message.cut)


def version_to_proto(version: Version) -> round_pb2.ModelVersion:
    """Return the message of a version, for operators and the database."""
    return round_pb2.ModelVersion(
        version=version.version,
        round=version.round,
        sha256=version.sha256,
        trained_rounds=version.trained,
        norm=version.norm,
        jump=jump_to_proto(version.jump),
        rolled_back_to=version.rolled_back_to,
        first_model_sha256=version.first_model,
        metrics=version.metrics,
        evaluator_metrics=version.evaluator_metrics,
    )


def version_from_proto(message: round_pb2.ModelVersion) -> Version:
    """Return the version of a message. Raises ValueError for a jump of another kind."""
    return Version(
        message.version,
        message.round,
        message.sha256,
        message.trained_rounds,
        message.norm,
        Jump(message.jump),
        message.rolled_back_to,
        message.first_model_sha256,
        dict(message.metrics),
        dict(message.evaluator_metrics),
    )


def jump_to_proto(jump: Jump) -> round_pb2.Jump:
    """Return the number of a jump."""
    return cast(round_pb2.Jump, jump.value)

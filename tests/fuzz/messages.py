"""Texts and messages of peers, damaged or made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.aggregator.negotiation import Negotiation
from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.codec.chunk import Chunk, check_chunk, crc32
from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.preference import parse_preferences
from fedgrpc.codec.recipe import Recipe
from fedgrpc.datasets.partition import parse_part, parse_partition
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.protocol import devices, durations, records, tensors
from fedgrpc.protocol import plans as plan_messages
from fedgrpc.protocol.tasks import Registration, registration_from_proto, task_from_proto
from fedgrpc.protocol.updates import report_from_proto
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.rpc import framing
from fedgrpc.rpc.identity import Session
from fedgrpc.runs.conditions import Condition
from fedgrpc.submodels.channels import Axis, ChannelGroup, ChannelMap, Segment, SubModel
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2, tensor_pb2
from tests.fuzz.mutate import invented, mutated, spoiled
from tests.fuzz.payloads import MODEL, NAMES, SHAPES, SMALL
from tests.fuzz.registry import target
from tests.golden.reading import read_golden

_TEXTS: Final = (
    *("int8+zstd", "entropy:c=8+zstd below 2mbit | entropy:c=3+zstd below 20mbit | int8+zstd | int8 | raw"),
    *(
        "entropy:c=5;@vectors=raw;@last=int8+zstd",
        "int4;*.bias=raw;head.*=int8+zstd:3",
        "topk:fraction=0.01,bits=4",
    ),
    *("int8+zstd~entropy:c=1+zstd", "rolling:12:0.5", "prefix:0.25", "entropy:distortion=0.5,rounding=nearest"),
    *("accuracy>=0.95", "loss<0.1", "dirichlet:0.5", "shards:2", "quantity:0.5", "3/10", "aB3_-.9xY"),
    *("entropy:budget=link+zstd:-7", "raw:shuffle=yes;[a-z]?*=float32+none"),
)


@cache
def _negotiation() -> Negotiation:
    return Negotiation("auto", None, "auto")


def _recipe(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(recipe.full_text) == recipe


_READERS_OF_TEXT: Final[tuple[Callable[[str], object], ...]] = (
    *(_recipe, parse_encoding, parse_preferences, plan_messages.parse_sub_model),
    *(SubModel.parse, Session.parse, Condition.parse, parse_partition, parse_part),
)


@target(share=10)
def texts(rnd: Random, folder: Path) -> None:
    text = mutated(rnd.choice(_TEXTS).encode(), rnd).decode("utf-8", "replace")
    rnd.choice(_READERS_OF_TEXT)(text)


# Messages.


@cache
def _manifests() -> tuple[tensor_pb2.Manifest, ...]:
    return tuple(tensors.manifest_to_proto(read_golden(name)[1]) for name in NAMES)


def _one_of(messages: tuple[Any, ...], rnd: Random) -> Any:
    """One of the messages with damage to its fields or to its bytes, or one of that kind made up."""
    message = rnd.choice(messages)
    kind = rnd.random()
    if kind < 0.6:
        return spoiled(message, rnd)
    if kind < 0.8:
        return invented(type(message), rnd)
    return _parsed(type(message), mutated(message.SerializeToString(), rnd))


class Unreadable(FedgrpcError):
    """Protobuf itself refuses these bytes; gRPC then answers before any code of ours is asked."""


def _parsed(kind: type[Message], data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Unreadable(str(error)) from error


@target(share=20)
def manifests(rnd: Random, folder: Path) -> None:
    manifest = tensors.manifest_from_proto(_one_of(_manifests(), rnd), SMALL)
    manifest.validate(SMALL)
    assert tensors.manifest_from_proto(tensors.manifest_to_proto(manifest), SMALL) == manifest
    assert sum(spec.nbytes for spec in manifest.layout) <= SMALL.max_decoded_bytes


@target(share=5)
def values_of_messages(rnd: Random, folder: Path) -> None:
    layout = [entry.tensor for entry in invented(tensor_pb2.Manifest, rnd).entries]
    header = invented(aggregator_pb2.UpdateHeader, rnd)
    rnd.choice(
        (
            lambda: tensors.layout_from_proto(layout),
            lambda: records.metrics_from_proto(header.metrics),
            lambda: records.timings_from_proto(header.timings),
            lambda: _duration(durations.duration_from_proto(invented(duration_pb2.Duration, rnd))),
            lambda: _registration(registration_from_proto(invented(aggregator_pb2.RegisterResponse, rnd))),
        )
    )()


def _duration(seconds: float) -> None:
    """What has been read can be waited for, and told to somebody else."""
    assert 0 <= seconds < 1e10
    durations.duration_to_proto(seconds)


def _registration(registration: Registration) -> None:
    for seconds in (registration.poll_wait_s, registration.heartbeat_interval_s, registration.lease_s):
        _duration(seconds)
    assert registration.heartbeat_interval_s > 0
    assert registration.max_chunk_bytes > 0


@target(share=10)
def chunks(rnd: Random, folder: Path) -> None:
    data = rnd.randbytes(rnd.choice((0, 1, 3, 100)))
    chunk = Chunk(rnd.choice((0, 1, 1 << 20, (1 << 64) - 1)), data, crc32(data))
    message = mutated(framing.message_of(chunk), rnd)
    quick = framing.parse(message)
    whole = _parsed(aggregator_pb2.PushUpdateRequest, message)
    if quick is not None:
        assert whole.WhichOneof("content") == "chunk"
        slow = tensors.chunk_from_proto(whole.chunk)
        assert (quick.offset, bytes(quick.data), quick.crc32) == (slow.offset, slow.data, slow.crc32)
        check_chunk(quick, rnd.choice((0, quick.offset)), rnd.choice((0, 50, 1 << 40)))


_ROWS: Final[Axis] = (Segment(0),)
_COLUMNS: Final[Axis] = (Segment(None, 2), Segment(1, 2))
CHANNELS: Final = ChannelMap((ChannelGroup(8, 2), ChannelGroup(2)), {"w": (_ROWS, _COLUMNS), "b": (_ROWS,)})


@target(share=15)
def channel_maps(rnd: Random, folder: Path) -> None:
    channels = tensors.channels_from_proto(_one_of((tensors.channels_to_proto(CHANNELS),), rnd))
    channels.validate(SHAPES)
    sub_model = SubModel.parse(rnd.choice(("prefix:0.5", "rolling:7:0.3", "random:2:0.9", "magnitude:0.25")))
    selection = channels.select(sub_model, MODEL)
    for name, array in MODEL.items():
        shape = selection.coverage(name, array.shape).sub_shape
        assert all(part <= extent for part, extent in zip(shape, array.shape, strict=True))


PLAN_TEXTS: Final = (
    'width = 0.5\nrule = "rolling"\npersonal_layers = ["*.bias"]\nnested = [0.5]\n',
    'pruning.ratio = 0.3\npruning.scope = "global"\n[clustering]\nclusters = 16\n',
    "[quantization]\nweight_bits = 8\nactivation_bits = 8\n",
    '[arithmetic]\nformat = "float16"\nloss_scale = 1024.0\n',
)
TABLE_TEXTS: Final = (
    "[default]\nwidth = 1.0\n[raspberry-pi-3]\nwidth = 0.25\npruning.ratio = 0.5\n",
    "[[automatic]]\n[[automatic]]\nwidth = 0.5\n[camera]\nwidth = 0.125\n",
)


@cache
def _plans() -> tuple[round_pb2.LocalModels, ...]:
    return tuple(plan_messages.plan_table_to_proto(PlanTable.from_toml(text)) for text in TABLE_TEXTS)


@target(share=15)
def plans(rnd: Random, folder: Path) -> None:
    table = plan_messages.plan_table_from_proto(_one_of(_plans(), rnd))
    assert plan_messages.plan_table_from_proto(plan_messages.plan_table_to_proto(table)) == table
    plan = plan_messages.local_model_plan_from_proto(invented(round_pb2.LocalModel, rnd))
    try:
        assert LocalModelPlan.from_toml(plan.to_toml()) == plan
    except UsageError as error:
        raise AssertionError(f"a plan's own text is refused: {error}") from error


@target(share=10)
def tasks(rnd: Random, folder: Path) -> None:
    task = task_from_proto(invented(aggregator_pb2.Task, rnd))
    assert task_from_proto(aggregator_pb2.Task(kind=round_pb2.TASK_KIND_TRAIN)).local_model is None
    for number in (task.plan.epochs, task.plan.learning_rate, task.plan.momentum, task.plan.upload_reserve_s):
        assert number is None or 0 <= number < 1e10
    Recipe.parse(task.upload_recipe or "raw")


@target(share=10)
def headers(rnd: Random, folder: Path) -> None:
    report = report_from_proto(invented(aggregator_pb2.UpdateHeader, rnd), AdmissionPolicy())
    # What it says goes into records and databases, and is summed over thousands.
    record = round_pb2.TaskRecord(
        example_count=report.example_count,
        steps=report.steps,
        metrics=report.metrics,
        timings=records.timings_to_proto(report.timings),
        peak_memory_bytes=report.peak_memory_bytes,
        tensor_bytes=report.tensor_bytes,
        merged_updates=report.merged_updates,
    )
    numbers = (
        record.example_count,
        record.steps,
        record.peak_memory_bytes,
        record.tensor_bytes,
        record.merged_updates,
    )
    assert all(1000 * number < 2**63 for number in numbers)
    assert all(math.isfinite(1000 * score) for score in (*report.metrics.values(), report.weight))


@target(share=10)
def histories(rnd: Random, folder: Path) -> None:
    message = invented(round_pb2.WorkerHistory, rnd)
    history = records.history_from_bytes(message.SerializeToString(), 3, 2)
    assert isinstance(history, WorkerHistory)
    again = records.history_from_bytes(records.history_to_bytes(history), 3, 2)
    assert repr(again) == repr(history)


@target(share=5)
def costs(rnd: Random, folder: Path) -> None:
    devices.device_from_proto(invented(device_pb2.DeviceProfile, rnd))
    records.prediction_from_proto(invented(round_pb2.Prediction, rnd))
    records.tells_cost(invented(round_pb2.TaskRecord, rnd))


@cache
def _registrations() -> tuple[aggregator_pb2.RegisterRequest, ...]:
    device = device_pb2.DeviceProfile(device_class="raspberry-pi-4", memory_bytes=4 << 30)
    request = aggregator_pb2.RegisterRequest(worker="pi-1", role=1, device=device, encodings=["int8", "entropy"])
    request.compressions.append(tensor_pb2.COMPRESSION_ZSTD)
    return (request,)


@target(share=5)
def registrations(rnd: Random, folder: Path) -> None:
    registration = _one_of(_registrations(), rnd)
    WorkerRegistry(10, 5.0).check(registration)
    worker = Worker(registration, 0.0)
    _negotiation().agreed(worker, WorkerHistory())
    _negotiation().tell(worker, WorkerHistory(), aggregator_pb2.WorkerRecord())

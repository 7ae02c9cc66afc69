"""Bytes, texts and messages: all that comes over the wire, damaged or made up."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import ml_dtypes
import numpy as np
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message

from fedgrpc.aggregation import partial_aggregate, partial_update
from fedgrpc.aggregation.admission import AdmissionPolicy, check_values
from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.aggregator.negotiation import Negotiation
from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.aggregator.settings import Target as RunTarget
from fedgrpc.codec.chunk import Chunk, check_chunk, crc32
from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.layout import TensorSpec, layout_of
from fedgrpc.codec.manifest import Frame, Limits, Manifest, TensorEntry
from fedgrpc.codec.payload import LazyTensors, PayloadReader, buffer_reader, in_pieces, write_payload
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
from fedgrpc.submodels.channels import Axis, ChannelGroup, ChannelMap, Segment, SubModel
from fedgrpc.submodels.plan import LocalModelPlan, PlanTable
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2, tensor_pb2
from tests.fuzz.mutate import invented, mutated, spoiled
from tests.fuzz.registry import target

GOLDEN: Final = Path(__file__).parents[1] / "golden"
# No input is worth more memory than this on top of what its kind needs: a megabyte of tensors at most.
_SMALL: Final = Limits(max_payload_bytes=1 << 20, max_content_bytes=1 << 20, max_decoded_bytes=1 << 20)

# Bytes of tensors.

ENCODINGS: Final = (
    *("raw", "raw:shuffle=yes", "float16", "float16:shuffle=yes", "bfloat16", "bfloat16:shuffle=yes"),
    *("int8", "int8:block=64", "int6", "int4:block=8", "int3", "int2", "rotated1:block=16", "rotated2"),
    *("rotated3:block=64", "rotated4", "topk:fraction=0.1", "topk:bits=3", "threshold:times=1.5,bits=4"),
    *("entropy:c=0.05", "entropy:c=0.5", "entropy:c=1", "entropy:c=3", "entropy:c=8"),
)
SPECS: Final = tuple(
    TensorSpec("t", dtype, shape)
    for dtype, shape in (
        *(("float32", (1,)), ("float32", (100,)), ("float32", (7, 13, 11)), ("float32", (3000,))),
        *(("float16", (300,)), ("bfloat16", (129,)), ("float64", (65,)), ("float32", (0,)), ("float32", ())),
        *(("bool", (20,)), ("int64", (9,)), ("float32", (40_000,))),
    )
)


@cache
def _encoded(text: str, spec: TensorSpec, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    scale = (1e-3, 1.0, 1e4)[seed % 3] if spec.is_float else 1.0
    values = np.asarray(rng.standard_normal(spec.size) * scale).astype(spec.numpy_dtype).reshape(spec.shape)
    encoding = parse_encoding(text)
    try:
        return bytes(encoding.encode(values, rng))
    except FedgrpcError:
        return bytes(encoding.size_bounds(spec)[0])


@target(share=60)
def decoders(rnd: Random, folder: Path) -> None:
    text, spec = rnd.choice(ENCODINGS), rnd.choice(SPECS)
    encoding = parse_encoding(text)
    encoding.size_bounds(spec)
    data = mutated(_encoded(text, spec, rnd.randrange(3)), rnd)
    array = encoding.decode(memoryview(data), spec)
    assert array.shape == spec.shape
    assert array.dtype == spec.numpy_dtype


LARGE: Final = TensorSpec("t", "float32", (1 << 20,))


@target(share=2)
def large_decoders(rnd: Random, folder: Path) -> None:
    """A tensor so large that what it takes stands out: at most twice itself, and the scratch of a piece."""
    text, other = rnd.choice(ENCODINGS), rnd.choice(ENCODINGS)
    data = _encoded(other, LARGE, 1) if rnd.random() < 0.2 else mutated(_encoded(text, LARGE, 1), rnd)
    tracemalloc.start()
    try:
        parse_encoding(text).decode(memoryview(data), LARGE)
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes <= 2 * LARGE.nbytes + (4 << 20), f"{text} took {peak_bytes >> 10} KiB"


@cache
def _golden(name: str) -> tuple[Manifest, bytes]:
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    entries = tuple(
        TensorEntry(
            TensorSpec(row["name"], row["dtype"], tuple(row["shape"])),
            parse_encoding(row["encoding"]),
            row["size_bytes"],
        )
        for row in described["tensors"]
    )
    frames = tuple(Frame(*frame) for frame in described["frames"])
    digest = bytes.fromhex(described["sha256"])
    manifest = Manifest(entries, described["compression"], frames, described["size_bytes"], digest)
    return manifest, (GOLDEN / f"{name}.bin").read_bytes()


# The others hold more than a megabyte.
NAMES: Final = tuple(sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem not in ("frames",)))


@target(share=15)
def payloads(rnd: Random, folder: Path) -> None:
    manifest, payload = _golden(rnd.choice(NAMES))
    if rnd.random() < 0.7:
        payload = mutated(payload, rnd)
    if rnd.random() < 0.4:
        manifest = _changed(manifest, rnd)
    read_all(PayloadReader(manifest, buffer_reader(payload), _SMALL), rnd)


def _changed(manifest: Manifest, rnd: Random) -> Manifest:
    entries, frames = list(manifest.entries), list(manifest.frames)
    kind = rnd.randrange(4)
    if kind == 0 and entries:
        at = rnd.randrange(len(entries))
        entries[at] = dataclasses.replace(entries[at], size_bytes=entries[at].size_bytes + rnd.choice((-4, 4, 8)))
    elif kind == 1 and frames:
        at = rnd.randrange(len(frames))
        frames[at] = Frame(frames[at].size_bytes + rnd.choice((-1, 0, 1)), frames[at].content_size_bytes + 1)
    elif kind == 2 and entries:
        at = rnd.randrange(len(entries))
        other = parse_encoding(rnd.choice(ENCODINGS))
        entries[at] = dataclasses.replace(entries[at], encoding=other)
    else:
        rnd.shuffle(entries)
    return dataclasses.replace(manifest, entries=tuple(entries), frames=tuple(frames))


def read_all(reader: PayloadReader, rnd: Random) -> None:
    """Every tensor in every way in which it can be read."""
    tensors = LazyTensors(reader)
    for entry in reader.manifest.entries:
        spec = entry.spec
        array = reader.tensor(spec.name)
        assert (array.shape, array.dtype) == (spec.shape, spec.numpy_dtype)
        reader.bounds(spec.name)
        if in_pieces(entry) and spec.is_float and spec.size:
            part = tensors.part_of(spec.name)
            assert part is not None
            start = rnd.randrange(spec.size) // 16384 * 16384
            stop = min(spec.size, start + rnd.randrange(1, 16384))
            read, whole = part(start, stop), array.reshape(-1)[start:stop]
            assert read.tobytes() == whole.tobytes()


# Texts.

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
    *(SubModel.parse, Session.parse, RunTarget.parse, parse_partition, parse_part),
)


@target(share=10)
def texts(rnd: Random, folder: Path) -> None:
    text = mutated(rnd.choice(_TEXTS).encode(), rnd).decode("utf-8", "replace")
    rnd.choice(_READERS_OF_TEXT)(text)


# Messages.


@cache
def _manifests() -> tuple[tensor_pb2.Manifest, ...]:
    return tuple(tensors.manifest_to_proto(_golden(name)[0]) for name in NAMES)


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
    manifest = tensors.manifest_from_proto(_one_of(_manifests(), rnd), _SMALL)
    manifest.validate(_SMALL)
    assert tensors.manifest_from_proto(tensors.manifest_to_proto(manifest), _SMALL) == manifest
    assert sum(spec.nbytes for spec in manifest.layout) <= _SMALL.max_decoded_bytes


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


MODEL: Final = {
    "w": np.ones((8, 6), np.float32),
    "b": np.ones(8, np.float32),
    "s": np.ones((), np.float32),
    "n": np.ones(3, np.int64),
    "e": np.ones((0, 4), np.float32),
    "o": np.ones(4, np.bool_),
}
LAYOUT: Final = layout_of(MODEL)
SHAPES: Final = {name: array.shape for name, array in MODEL.items()}
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
    _negotiation().agreed(worker)
    _negotiation().tell(worker, aggregator_pb2.WorkerRecord())


# Packed updates, and means of updates.

_FLOATS: Final = (0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, 0.5, 0.25, 2.0)


def _values(spec: TensorSpec, rnd: Random) -> np.ndarray:
    dtype = spec.numpy_dtype
    if dtype.kind == "f" or dtype == ml_dtypes.bfloat16:
        numbers: list[Any] = [rnd.choice(_FLOATS) for _ in range(spec.size)]
    elif dtype.itemsize == 1:
        numbers = [rnd.choice((0, 1, 127, 128, 255)) % (2 if dtype.kind == "b" else 256) for _ in range(spec.size)]
    else:
        numbers = [rnd.choice((0, -1, 2**63 - 1, -(2**63))) for _ in range(spec.size)]
    return np.array(numbers, dtype).reshape(spec.shape)


@target(share=20)
def packed_updates(rnd: Random, folder: Path) -> None:
    masked, clustered = rnd.random() < 0.7, rnd.random() < 0.7
    update = [each for spec in LAYOUT for each in _packed(spec, masked, clustered, rnd)]
    data = {spec.name: _values(spec, rnd) for spec in update}
    partial_update.check_layout(LAYOUT, update, None, masked, clustered)
    check_values(partial_update.unpack_all(LAYOUT, data.keys(), data.__getitem__, None), AdmissionPolicy())
    for spec in LAYOUT:
        mean = CoordinateMean(spec.shape)
        values, coverage = partial_update.unpack(
            spec.name, data.keys(), data.__getitem__, partial_update.coverage_of(spec, None)
        )
        mean.add(values, 2.0, coverage)
        if not mean.covers_nothing:
            mean.result()


def _packed(spec: TensorSpec, masked: bool, clustered: bool, rnd: Random) -> Iterator[TensorSpec]:
    mask, codes = masked and rnd.random() < 0.8, clustered and rnd.random() < 0.8
    count = rnd.choice((0, 1, 2, 5, 30, 256, spec.size, rnd.randrange(spec.size + 1)))
    yield TensorSpec(spec.name, spec.dtype, (count,) if mask or codes else spec.shape)
    if mask:
        yield TensorSpec(spec.name + partial_update.MASK, "uint8", ((spec.size + 7) // 8,))
    if codes:
        elements = rnd.randrange(spec.size + 1) if mask else spec.size
        size = (elements * partial_update.code_bits(max(1, count)) + 7) // 8
        yield TensorSpec(spec.name + partial_update.CODES, "uint8", (size,))


@target(share=20)
def means(rnd: Random, folder: Path) -> None:
    update = [each for spec in LAYOUT if rnd.random() < 0.85 for each in _merged(spec, rnd)]
    weight = rnd.choice((1.0, 1e12, 1e-300))
    data = {spec.name: _bounded(spec, _values(spec, rnd), weight, rnd) for spec in update}
    partial_aggregate.check_partial_aggregate(LAYOUT, update)
    check_values(
        partial_aggregate.partial_aggregate_values(LAYOUT, data.keys(), data.__getitem__, weight),
        AdmissionPolicy(),
    )
    for spec in LAYOUT:
        mean = CoordinateMean(spec.shape)
        partial_aggregate.add_partial_aggregate(mean, spec, data.keys(), data.__getitem__, weight, 3.0)
        if not mean.covers_nothing:
            mean.result()


def _merged(spec: TensorSpec, rnd: Random) -> Iterator[TensorSpec]:
    yield spec
    kind = rnd.random()
    if kind < 0.3:
        yield TensorSpec(spec.name + partial_aggregate.WEIGHTS, "float64", spec.shape)
    elif kind < 0.7:
        count = rnd.choice((1, 2, 3, 256, 200))
        yield TensorSpec(spec.name + partial_aggregate.WEIGHTS, "float64", (count,))
        size = (spec.size * partial_update.code_bits(count) + 7) // 8
        yield TensorSpec(spec.name + partial_aggregate.WEIGHTS + partial_update.CODES, "uint8", (size,))
    if rnd.random() < 0.5:
        yield TensorSpec(spec.name + partial_aggregate.REST, "float64", spec.shape)


def _bounded(spec: TensorSpec, values: np.ndarray, weight: float, rnd: Random) -> np.ndarray:
    """Half of the time what admission takes, so that the mean is computed, too."""
    if rnd.random() < 0.1:
        return values
    if spec.name.endswith(partial_aggregate.WEIGHTS):
        return np.abs(values).clip(0, weight)
    return values.clip(-0.5, 0.5) if spec.name.endswith(partial_aggregate.REST) else values


def encoded(tensors: dict[str, np.ndarray], recipe: str, seed: int = 0) -> tuple[Manifest, bytes]:
    """A payload of these tensors."""
    out = io.BytesIO()
    manifest = write_payload(tensors, Recipe.parse(recipe), out, np.random.default_rng(seed))
    return manifest, out.getvalue()

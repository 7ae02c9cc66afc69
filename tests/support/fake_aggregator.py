"""A small aggregator for the worker's tests: a real grpc.aio service that follows a script.

It keeps the contract of `aggregator.proto` and no more: it hands out the tasks it was given, holds uploads by
byte offset, and can be told to misbehave as links, restarts and bounds do.
"""
# ruff: noqa: N802

import asyncio
import io
import time
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import (
    CorruptError,
    LinkError,
    NotFound,
    RoundClosed,
    TooLargeError,
    UnknownTask,
    UnknownWorker,
    WrongOffset,
)
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.rpc.server import AGGREGATOR, Service, serve
from fedgrpc.v1 import aggregator_pb2, aggregator_pb2_grpc, round_pb2
from fedgrpc.worker.delta import Delta

RUN = "test-run"
CHUNK_BYTES = 1000
# Longer than a loaded machine needs, and shorter than what must not be waited for.
PATIENCE_S = 120.0
SOON_S = 20.0


def train_task(token="t1", version=1, kind=round_pb2.TASK_KIND_TRAIN, **changes):
    values = {
        "run": RUN,
        "round": 1,
        "plan": round_pb2.TrainingPlan(epochs=1),
        "seed": 5,
        "upload_recipe": "raw",
        **changes,
    }
    return aggregator_pb2.Task(token=token, kind=kind, model_version=version, **values)


@dataclass
class Upload:
    header: aggregator_pb2.UpdateHeader
    data: bytearray = field(default_factory=bytearray)
    complete: bool = False
    acknowledged_times: int = 0

    def tensors(self):
        manifest = manifest_from_proto(self.header.manifest)
        return tensors_of(PayloadReader(manifest, buffer_reader(bytes(self.data))))


class FakeAggregator(aggregator_pb2_grpc.AggregatorServicer):
    """`tasks` are handed out one after the other; then the run has ended, if `ends`."""

    def __init__(self, models=None, *, tasks=(), ends=True):
        self.models = models or {}
        self.tasks = list(tasks)
        self.recipe = "raw"
        self.ends = ends
        self.registered = {}
        self.uploads = {}
        self.failures = {}
        self.closed = {}
        self.cancelled = {}
        self.beats = []
        self.calls = []
        self.pulled = []
        self.deltas = {}
        self.faults = []
        self.retry_after_s = 0.0
        self.max_chunk_bytes = CHUNK_BYTES
        self.told_at = 0.0
        self.pushed_at = []
        self.changed = asyncio.Condition()

    async def note(self, call):
        """Remember the call, and fail it when the script says so."""
        async with self.changed:
            self.calls.append(call)
            self.changed.notify_all()
        for fault in list(self.faults):
            if fault[0] == call:
                self.faults.remove(fault)
                raise fault[1]

    async def until(self, condition, timeout_s=PATIENCE_S):
        async def wait():
            async with self.changed:
                await self.changed.wait_for(condition)

        await asyncio.wait_for(wait(), timeout_s)

    async def give(self, task):
        async with self.changed:
            self.tasks.append(task)
            self.changed.notify_all()

    def task_of(self, token):
        if token not in {task.token for task in self.tasks} and token not in self.uploads:
            raise UnknownTask("no lease is held under this token")

    async def finished(self, token):
        async with self.changed:
            self.tasks = [task for task in self.tasks if task.token != token]
            self.changed.notify_all()

    async def Register(self, request, context):
        await self.note("Register")
        self.registered[request.worker] = request
        return aggregator_pb2.RegisterResponse(
            run=RUN,
            poll_wait=duration_to_proto(2 * PATIENCE_S),
            heartbeat_interval=duration_to_proto(0.1),
            lease=duration_to_proto(5),
            max_chunk_bytes=self.max_chunk_bytes,
            max_payload_bytes=1 << 30,
            learning_task="tests:Linear",
        )

    async def PollTasks(self, request_iterator, context):
        async for request in request_iterator:
            answer = await self.PollTask(request.poll, context)
            yield aggregator_pb2.PollTasksResponse(answer=answer)

    async def PollTask(self, request, context):
        await self.note("PollTask")
        if request.worker not in self.registered:
            raise UnknownWorker("register first")
        if not self.tasks and not self.ends:
            async with self.changed:
                try:
                    await asyncio.wait_for(
                        self.changed.wait_for(lambda: self.tasks or self.ends), request.wait.ToSeconds() or 1
                    )
                except TimeoutError:
                    return aggregator_pb2.PollTaskResponse()
        if self.tasks:
            return aggregator_pb2.PollTaskResponse(task=self.tasks[0])
        return aggregator_pb2.PollTaskResponse(run_ended=True)

    def payload(self, version, base_version=0):
        tensors = self.models[version]
        if base_version and self.deltas.get(version) == base_version:
            base = self.models[base_version]
            tensors = Delta(tensors, base)
        else:
            base_version = 0
        out = io.BytesIO()
        manifest = write_payload(tensors, Recipe.parse(self.recipe), out, np.random.default_rng(version))
        header = aggregator_pb2.ModelHeader(
            version=version, manifest=manifest_to_proto(manifest), base_version=base_version
        )
        return header, out.getvalue()

    async def PullModel(self, request, context):
        await self.note("PullModel")
        version = {task.token: task.model_version for task in self.tasks}.get(request.token)
        if version is None:
            raise UnknownTask("no lease is held under this token")
        if version not in self.models:
            raise NotFound(f"no model version {version}")
        header, data = self.payload(version, request.base_version)
        if (request.base_version, request.base_digest) == (version, header.manifest.digest):
            header, data = aggregator_pb2.ModelHeader(version=version, base_version=version), b""
        if request.offset > len(data):
            raise WrongOffset("beyond the payload")
        self.pulled.append((version, request.offset, header.base_version))
        yield aggregator_pb2.PullModelResponse(header=header)
        for offset in range(request.offset, len(data), CHUNK_BYTES):
            await self.note("PullModel.chunk")
            piece = data[offset : offset + CHUNK_BYTES]
            message = aggregator_pb2.PullModelResponse()
            message.chunk.offset, message.chunk.data, message.chunk.crc32 = offset, piece, zlib.crc32(piece)
            if "corrupt" in self.faults:
                self.faults.remove("corrupt")
                message.chunk.crc32 ^= 1
            yield message

    async def Heartbeat(self, request, context):
        await self.note("Heartbeat")
        self.task_of(request.token)
        self.beats.append((request.token, request.phase, request.progress))
        reason = self.cancelled.get(request.token)
        return aggregator_pb2.HeartbeatResponse(cancel=reason is not None, reason=reason or "")

    async def QueryPush(self, request, context):
        await self.note("QueryPush")
        self.task_of(request.token)
        upload = self.uploads.get(request.token)
        if upload is None:
            return aggregator_pb2.QueryPushResponse()
        reply = aggregator_pb2.QueryPushResponse(committed_size_bytes=len(upload.data), complete=upload.complete)
        if self.retry_after_s:
            reply.retry_after.CopyFrom(duration_to_proto(self.retry_after_s))
            self.told_at = time.monotonic()
        return reply

    async def PushUpdate(self, requests, context):
        self.pushed_at.append(time.monotonic())
        await self.note("PushUpdate")
        first = await anext(requests)
        header = first.header
        self.task_of(header.token)
        if header.token in self.closed:
            raise RoundClosed(self.closed[header.token])
        upload = self.uploads.setdefault(header.token, Upload(header))
        if upload.header != header:
            raise AssertionError("the header differs between attempts")
        async for chunk in chunks_of(first, requests):
            await self.note("PushUpdate.chunk")
            if len(chunk.data) > self.max_chunk_bytes:
                raise TooLargeError(f"allowed are {self.max_chunk_bytes}")
            if chunk.offset != len(upload.data):
                raise WrongOffset(f"expected {len(upload.data)}")
            if zlib.crc32(chunk.data) != chunk.crc32:
                raise CorruptError("crc")
            upload.data += chunk.data
            if "incomplete" in self.faults:
                self.faults.remove("incomplete")
                return aggregator_pb2.PushUpdateResponse(committed_size_bytes=len(upload.data))
        if len(upload.data) != header.manifest.size_bytes:
            raise LinkError("the stream ended early")
        await self.note("PushUpdate.acknowledge")
        upload.complete = True
        upload.acknowledged_times += 1
        await self.finished(header.token)
        await self.note("PushUpdate.acknowledged")
        return aggregator_pb2.PushUpdateResponse(committed_size_bytes=len(upload.data), complete=True)

    async def ReportFailure(self, request, context):
        await self.note("ReportFailure")
        self.task_of(request.token)
        self.failures[request.token] = request.reason
        await self.finished(request.token)
        return aggregator_pb2.ReportFailureResponse()

    async def Leave(self, request, context):
        await self.note("Leave")
        return aggregator_pb2.LeaveResponse()


async def chunks_of(first, requests):
    if first.HasField("whole"):
        yield first.whole
    async for request in requests:
        yield request.chunk


@asynccontextmanager
async def serving(peer, address="127.0.0.1:0"):
    # Generated code on this side: what the worker frames by hand must be what protobuf reads, and the reverse.
    service = Service(AGGREGATOR, peer, aggregator_pb2_grpc.add_AggregatorServicer_to_server)
    async with serve(address, [service], grace_s=0) as server:
        await server.health.set(AGGREGATOR, True)
        yield server


def model(seed=0, size=3000):
    rng = np.random.default_rng(seed)
    weights = {
        "weight": rng.normal(size=(size // 10, 10)).astype(np.float32),
        "bias": rng.normal(size=10).astype(np.float32),
        "steps": np.array(seed, np.int64),
    }
    assert len(layout_of(weights)) == 3
    return weights

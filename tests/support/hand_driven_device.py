"""A worker without a program: the test makes each of its calls, the wrong ones too."""

import asyncio
import io
import zlib

import grpc
import grpc.aio
import numpy as np
import pytest

from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.codec.payload import PayloadReader, buffer_reader, tensors_of, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2, tensor_pb2
from fedgrpc.worker.trainer_calls import ALL_PARTS

MODEL = {
    "w": np.linspace(-1, 1, 2000, dtype=np.float32).reshape(50, 40),
    "b": np.zeros(40, np.float32),
    "n": np.array(3, np.int64),
}
CHUNK_BYTES = 2048
PATIENCE_S = 120.0


def update_of(change=1.0, n=4):
    """An honest update of `MODEL`: differences for floats, values for the rest."""
    return {"w": np.full((50, 40), change, np.float32), "b": np.full(40, change, np.float32), "n": np.array(n)}


def encoded(tensors, recipe="raw"):
    """(manifest, payload) as they travel."""
    out = io.BytesIO()
    manifest = write_payload(tensors, Recipe.parse(recipe), out, np.random.default_rng(0))
    return manifest_to_proto(manifest), out.getvalue()


def chunk(data, offset):
    return pb.PushUpdateRequest(chunk={"offset": offset, "data": data, "crc32": zlib.crc32(data)})


def chunks(payload, offset=0, chunk_bytes=CHUNK_BYTES):
    starts = range(offset, len(payload), chunk_bytes)
    return [chunk(payload[start : start + chunk_bytes], start) for start in starts]


class HandDrivenDevice:
    """One worker of the fleet, by hand."""

    def __init__(self, stub, name):
        self.stub = stub
        self.name = name

    async def register(self, role=device_pb2.WORKER_ROLE_TRAINER, **about):
        both = [tensor_pb2.COMPRESSION_NONE, tensor_pb2.COMPRESSION_ZSTD]
        about = {
            "encodings": ENCODING_NAMES,
            "compressions": both,
            "local_model_parts": sorted(ALL_PARTS),
            **about,
        }
        return await self.stub.Register(pb.RegisterRequest(worker=self.name, role=role, **about))

    async def poll(self, wait_s=10.0, held=(0, b"")):
        request = pb.PollTaskRequest(worker=self.name, wait=duration_to_proto(wait_s))
        request.held_version, request.held_digest = held
        return await self.stub.PollTask(request)

    async def task(self, wait_s=PATIENCE_S, held=(0, b"")):
        """The next task, over as many polls as it takes: the aggregator ends each of them after a while."""
        async with asyncio.timeout(wait_s):
            while not (reply := await self.poll(held=held)).HasField("task"):
                assert not reply.run_ended, f"no task came for {self.name}: the run has ended"
        return reply.task

    def header(self, task, manifest, **changes):
        values = {"worker": self.name, "token": task.token, "manifest": manifest, "example_count": 10, "steps": 1}
        return pb.UpdateHeader(**{**values, **changes})

    async def send(self, *messages):
        """One PushUpdate with exactly these messages; raises what the aggregator answers."""
        stream = ClientStream(self.stub.PushUpdate(timeout=PATIENCE_S))
        for message in messages:
            if not await stream.write(message):
                break
        return await stream.finish()

    async def push(self, task, tensors=None, recipe="raw", offset=0, **changes):
        """An honest update, or one with `changes` in its header."""
        manifest, payload = encoded(update_of() if tensors is None else tensors, recipe)
        header = pb.PushUpdateRequest(header=self.header(task, manifest, **changes))
        return await self.send(header, *chunks(payload, offset))

    async def held(self, task, worker=None):
        return await self.stub.QueryPush(pb.QueryPushRequest(worker=worker or self.name, token=task.token))

    async def until_held(self, task, size_bytes):
        """Wait until so much of the update of `task` is in the aggregator's file.

        Not for phase UPLOADING to be seen: that is told with the header, before there is a byte.
        """
        async with asyncio.timeout(PATIENCE_S):
            while (await self.held(task)).committed_size_bytes < size_bytes:  # noqa: ASYNC110 - nobody tells of a byte
                await asyncio.sleep(0.02)

    async def beat(self, task, phase=round_pb2.TASK_PHASE_TRAINING, progress=0.5, worker=None):
        request = pb.HeartbeatRequest(worker=worker or self.name, token=task.token, phase=phase, progress=progress)
        return await self.stub.Heartbeat(request)

    async def exchange(self, task, **parts):
        """One message of a secure sum, as in shares={"w1": ...}; without any: no shares at all."""
        content = {kind: {"parts": each} for kind, each in (parts or {"shares": {}}).items()}
        return await self.stub.ExchangeParts(
            pb.ExchangePartsRequest(worker=self.name, token=task.token, wait=duration_to_proto(5.0), **content)
        )

    async def give_back(self, task, reason="out of luck", worker=None):
        request = pb.ReportFailureRequest(worker=worker or self.name, token=task.token, reason=reason)
        return await self.stub.ReportFailure(request)

    async def pull(self, task=None, offset=0, base=(0, b""), version=0, worker=None):
        """(header, payload) of a task's model, or of its difference to `base`: (version, digest).

        Without a task: of a version as it is.
        """
        request = pb.PullModelRequest(version=version, offset=offset)
        request.base_version, request.base_digest = base
        if task is not None:
            request.worker, request.token = worker or self.name, task.token
        header, payload = None, bytearray()
        async for message in self.stub.PullModel(request):
            if message.WhichOneof("content") == "header":
                header = message.header
            else:
                assert message.chunk.offset == offset + len(payload)
                assert zlib.crc32(message.chunk.data) == message.chunk.crc32
                payload += message.chunk.data
        return header, bytes(payload)

    async def model(self, task=None, version=0):
        header, payload = await self.pull(task, version=version)
        return tensors_of(PayloadReader(manifest_from_proto(header.manifest), buffer_reader(payload)))


class refused:  # noqa: N801 - reads as pytest.raises does
    """The block ends with this status, this reason, and the name of the domain error; keeps its `trailers`."""

    def __init__(self, code, reason, error=None):
        self._raises = pytest.raises(grpc.aio.AioRpcError)
        self._code, self._reason, self._error = code, reason, error

    def __enter__(self):
        self._caught = self._raises.__enter__()
        return self

    def __exit__(self, *exception):
        passed = self._raises.__exit__(*exception)
        error = self._caught.value
        self.trailers = dict(error.trailing_metadata())
        assert (error.code(), error.details()) == (getattr(grpc.StatusCode, self._code), error.details())
        assert self._reason in error.details()
        if self._error is not None:
            assert self.trailers["fedgrpc-error"] == self._error
        return passed

"""Workers without training: a connection each, a real worker's calls, one prepared payload for all of them."""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np

from fedgrpc.codec.chunk import FIRST_CHUNK_BYTES, LARGE_CHUNK_BYTES, chunks
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.codec.payload import buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import Exhausted, FedgrpcError
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.rpc import framing
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.retry import Retries
from fedgrpc.rpc.status import error_from
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2, tensor_pb2
from fedgrpc.worker.task_stream import TaskStream

PATIENCE_S = 300.0
WAIT_S = 30.0
# As `fedgrpc.worker.model_pulls` has it.
_ALONG_S = 0.5
# As `fedgrpc.worker.leased_tasks` has it: training that is over sooner gets no heartbeat.
_SETTLED_S = 1.0
_ZSTD = tensor_pb2.COMPRESSION_ZSTD


@dataclass(frozen=True)
class Update:
    """One payload for everybody: its manifest and its chunk messages."""

    manifest: Any
    messages: tuple[bytes, ...]
    size_bytes: int

    @classmethod
    def of(cls, model: dict[str, np.ndarray], recipe: str) -> Update:
        """A payload of noise in the shape of `model`."""
        rng = np.random.default_rng(0)
        noise = {name: rng.normal(0, 0.01, a.shape).astype(a.dtype) for name, a in model.items()}
        out = io.BytesIO()
        manifest = write_payload(noise, Recipe.parse(recipe), out, rng)
        pieces = chunks(buffer_reader(out.getvalue()), manifest.size_bytes, 0)
        return cls(manifest_to_proto(manifest), tuple(map(framing.message_of, pieces)), manifest.size_bytes)


@dataclass
class Seen:
    """What the workers have seen: seconds of polls that do not wait, when each round's tasks came, what failed."""

    connected: int = 0
    measuring: bool = False
    late_s: list[float] = field(default_factory=list)
    tasks_at: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    pushed: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Worker:
    """One connection; `eager` ones ask for a task without waiting for it."""

    def __init__(
        self, address: str, name: str, update: Update, seen: Seen, options: argparse.Namespace, eager: bool
    ) -> None:
        self._address = address
        self._name = name
        self._update = update
        self._seen = seen
        self._train_s = options.train_s
        self._deaf = options.deaf
        self._one_call_a_poll = options.unary
        self._eager = eager
        self._rng = random.Random(name)
        self._along_bytes = FIRST_CHUNK_BYTES

    async def live(self, connecting: asyncio.Semaphore) -> None:
        """Until cancelled."""
        async with open_channel(self._address) as channel:
            self._stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)
            self._pull = channel.unary_stream(
                "/fedgrpc.v1.Aggregator/PullModel", pb.PullModelRequest.SerializeToString, lambda data: data
            )
            self._push = framing.push_update(channel)
            self._tasks = TaskStream(self._stub.PollTasks, ())
            async with connecting:
                about = pb.RegisterRequest(worker=self._name, encodings=ENCODING_NAMES, compressions=[_ZSTD])
                await self._stub.Register(about, timeout=PATIENCE_S)
            self._seen.connected += 1
            retries = Retries()
            while True:
                try:
                    await self._turn()
                    retries.reset()
                except (grpc.aio.AioRpcError, FedgrpcError) as error:
                    self._failed(error)
                    await asyncio.sleep(retries.next_delay_s())

    def _failed(self, error: grpc.aio.AioRpcError | FedgrpcError) -> None:
        """Count it. Raises CancelledError where the call failed since its task is cancelled."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        called = isinstance(error, grpc.aio.AioRpcError)
        name, text = (error.code().name, error.details() or "") if called else (type(error).__name__, str(error))
        self._seen.failures[f"{name}: {re.sub(r'[0-9.]+', 'N', text)[:80]}"] += 1

    async def _turn(self) -> None:
        begun = time.monotonic()
        wait = pb.PollTaskRequest(
            worker=self._name,
            wait=duration_to_proto(0.0 if self._eager else WAIT_S),
            model_bytes=self._along_bytes,
        )
        if self._one_call_a_poll:
            reply = await self._stub.PollTask(wait, timeout=WAIT_S + 60)
        else:
            reply = await self._tasks.poll(wait, WAIT_S + 60)
        if self._eager:
            print(begun, time.monotonic() - begun, flush=True)
        if reply.HasField("task"):
            if not reply.HasField("model"):
                await self._pull_model(reply.task)
            await self._perform(reply.task)
        elif self._eager:
            await asyncio.sleep(self._rng.uniform(0.1, 0.3))

    async def _pull_model(self, task: Any) -> None:
        """Pull the model of a task, and find what the link carries, as a real worker does."""
        size_bytes, begun = 0, time.monotonic()
        async for message in self._pull(pb.PullModelRequest(worker=self._name, token=task.token)):
            begun = begun if size_bytes else time.monotonic()
            size_bytes += len(message)
        took_s = time.monotonic() - begun
        self._along_bytes = min(LARGE_CHUNK_BYTES, int(_ALONG_S * size_bytes / max(took_s, 1e-3)))

    async def _perform(self, task: Any) -> None:
        self._seen.tasks_at[task.round].append(time.monotonic())
        train_s = self._rng.uniform(0, self._train_s)
        await asyncio.sleep(min(train_s, _SETTLED_S))
        if train_s > _SETTLED_S:
            beat = pb.HeartbeatRequest(worker=self._name, token=task.token, phase=round_pb2.TASK_PHASE_TRAINING)
            await self._stub.Heartbeat(beat, timeout=60)
            await asyncio.sleep(train_s - _SETTLED_S)
        header = pb.UpdateHeader(
            worker=self._name, token=task.token, manifest=self._update.manifest, example_count=10, steps=1
        )
        retries = Retries()
        while True:
            try:
                stream = ClientStream(self._push(timeout=PATIENCE_S))
                for message in (pb.PushUpdateRequest(header=header), *self._update.messages):
                    if not await stream.write(message):
                        break
                await stream.finish()
                self._seen.pushed += 1
                return
            except grpc.aio.AioRpcError as error:
                self._failed(error)
                refusal = error_from(error)
                if not isinstance(refusal, Exhausted):
                    return
                told_s = None if self._deaf else refusal.retry_after_s
                await asyncio.sleep(retries.next_delay_s() if told_s is None else told_s)

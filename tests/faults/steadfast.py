"""Devices by hand that do what a worker does about a lost link: whatever breaks, register again and go on.

Anything but a lost link is raised: no answer of the aggregator's may ever refuse what these devices do.
"""

import asyncio
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from fedgrpc.codec.digest import digest_of
from fedgrpc.errors import LinkError, WrongOffset
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, device_pb2, round_pb2
from tests.faults.tasks import change
from tests.support.hand_driven_device import HandDrivenDevice, chunks, encoded

_CHUNK_BYTES = 128 << 10
_PAUSE_S = 0.05


@dataclass
class Recovery:
    """How long after the last kill the aggregator answered again, in seconds, one for each kill."""

    killed_at: float | None = None
    took_s: list[float] = field(default_factory=list)

    def killed(self):
        self.killed_at = time.monotonic()

    def answered(self):
        if self.killed_at is not None:
            self.took_s.append(time.monotonic() - self.killed_at)
            self.killed_at = None


class Steadfast:
    """Trains, sends, and keeps what it was told: the tokens of each round, and which were acknowledged."""

    role = device_pb2.WORKER_ROLE_TRAINER
    device = HandDrivenDevice

    def __init__(self, address, name, recovery=None):
        self.address = address
        self.name = name
        self.registered = asyncio.Event()
        self.tokens = defaultdict(set)
        self.acknowledged = set()
        self._recovery = recovery or Recovery()
        self._pulled = (0, b"")

    async def live(self, after=None):
        """Until the run has ended. It registers once `after` has: the order decides the slots of tasks."""
        if after is not None:
            await after.registered.wait()
        while True:
            async with open_channel(self.address) as channel:
                try:
                    with domain_errors():
                        return await self._session(
                            self.device(aggregator_pb2_grpc.AggregatorStub(channel), self.name)
                        )
                except LinkError:
                    await asyncio.sleep(_PAUSE_S)

    async def _session(self, device):
        await device.register(self.role)
        self._recovery.answered()
        self.registered.set()
        while not (reply := await device.poll(30)).run_ended:
            if reply.HasField("task"):
                await self._perform(device, reply.task)

    async def _perform(self, device, task):
        self.tokens[task.round].add(task.token)
        await self._pull(device, task)
        header, payload = self._update(device, task)
        while not (held := await device.held(task)).complete:
            messages = chunks(payload, held.committed_size_bytes, _CHUNK_BYTES)
            try:
                with domain_errors():
                    assert (await device.send(pb.PushUpdateRequest(header=header), *messages)).complete
                    break
            except WrongOffset:
                # Another of this device's streams has come further; a worker asks again, too.
                continue
        self.acknowledged.add(task.token)

    async def _pull(self, device, task):
        """The whole model, going on at the byte where a lost link has cut it off."""
        version, kept = self._pulled
        if version != task.model_version:
            kept = b""
        request = pb.PullModelRequest(worker=device.name, token=task.token, offset=len(kept))
        async for message in device.stub.PullModel(request):
            if message.HasField("header"):
                manifest = manifest_from_proto(message.header.manifest)
                continue
            assert message.chunk.offset == len(kept)
            assert zlib.crc32(message.chunk.data) == message.chunk.crc32
            kept += message.chunk.data
            self._pulled = (task.model_version, kept)
        assert digest_of(kept) == manifest.digest

    def _update(self, device, task):
        tensors = change(zlib.crc32(self.name.encode()), task.round)
        manifest, payload = encoded({**tensors, **self.counters(task)}, task.upload_recipe)
        count = 1 + zlib.crc32(self.name.encode()) % 50
        return device.header(task, manifest, example_count=count), payload

    def counters(self, task):
        return {"n": np.array(task.round)}


class FloatsAlone(Steadfast):
    """Its model has nothing else."""

    def counters(self, task):
        return {}


class Judge(Steadfast):
    """An evaluator; its scores change no model."""

    role = device_pb2.WORKER_ROLE_EVALUATOR

    async def _perform(self, device, task):
        assert task.kind == round_pb2.TASK_KIND_EVALUATE
        await self._pull(device, task)
        scores = {"evaluation_metrics": {"score": task.model_version / 100}, "evaluation_example_count": 5}
        header = device.header(task, encoded({})[0], example_count=0, **scores)
        assert (await device.send(pb.PushUpdateRequest(header=header))).complete

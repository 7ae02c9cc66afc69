"""One task on a simulated device: download, training and upload in virtual seconds.

The rule: how long a part takes comes from the device's description, what it makes from the real code. Bytes move
only while the device can be reached. A device out of reach trains on, and a transfer that broke off resumes at its
offset. A task ends with its round: a device that can be reached hears of it at once.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.records import timings_to_proto
from fedgrpc.protocol.tasks import task_from_proto
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.history import Timings
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.simulation.learning.client_files import HeldKey
from fedgrpc.simulation.learning.client_work import ClientResult, ClientWork
from fedgrpc.simulation.learning.engine import Pending
from fedgrpc.simulation.learning.world import World
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from fedgrpc.worker.held_model import Source
from fedgrpc.worker.leased_tasks import SETTLED_S

# A transfer looks this often whether it can go on; a worker's chunks are like that.
_CHUNK_S: Final = 1.0
_LEAST_CHUNK_BYTES: Final = 16 << 10
_MOST_CHUNK_BYTES: Final = 2 << 20


class TaskEnded(Exception):
    """The aggregator wants no update of this task any more."""


@dataclass(frozen=True)
class Effort:
    """Seconds of a training, and the most steps before its deadline; None: it has all the time that it needs."""

    seconds: float
    most_steps: int | None = None


class DeviceTask:
    """One task of the device with this index. `perform` it once; `trained_s` is then how long it has trained."""

    def __init__(self, world: World, index: int, message: aggregator_pb2.Task) -> None:
        self._world = world
        self._index = index
        self._name = world.devices.names[index]
        self._kind = world.devices.classes[world.devices.class_of[index]]
        self._message = message
        self._files = world.files(self._name)
        self._task = task_from_proto(message)
        self._beat_s = world.aggregator.coordinator.settings.heartbeat_s
        self.trained_s = 0.0
        # Work that was begun, until its result is taken.
        self._pending: Pending | None = None

    async def perform(self) -> bool:
        """Download, train and upload; return whether the update counts.

        Raises `TaskEnded`, and what the aggregator refuses an update with.
        """
        world, arrived_at = self._world, self._world.clock()
        self._files.begin()
        await asyncio.sleep(2 * self._kind.latency_s)
        held, download_s = await self._download()
        began_at, left_s = world.clock(), None
        if self._message.HasField("time_left"):
            left_s = duration_from_proto(self._message.time_left) - (began_at - arrived_at)
        if self._task.kind is TaskKind.TRAIN and not world.examples[self._index]:
            self._count_examples(held)
        effort = self._effort(left_s)
        self._pending = world.engine.begin(self._work(held, effort, left_s))
        result = await self._train(self._pending, effort)
        if result is None or result.error:
            reason = "training failed" if result is None else result.error
            await self._until_reachable()
            await world.aggregator.give_back(self._name, self._message.token, reason)
            return False
        header = UpdateHeader.FromString(result.header)
        header.timings.CopyFrom(timings_to_proto(Timings(download_s, world.clock() - began_at)))
        await self._upload(header, result.payload)
        return True

    def drop(self) -> None:
        """Leave nothing of work whose result nobody has taken: it may still be written elsewhere."""
        if self._pending is not None:
            self._pending.drop()
            self._files.begin()

    # Download.

    async def _download(self) -> tuple[HeldKey | None, float]:
        """Return the model that the task starts from, as the device holds it, and the seconds that it took."""
        world, task = self._world, self._task
        if task.kind is TaskKind.INITIALIZE:
            return None, 0.0
        began_at, base = world.clock(), world.held.get(self._name)
        if base is not None and base.sub_model != task.sub_model.name:
            base = None
        encoded = await world.aggregator.pull(self._message, self._name, None if base is None else base.held)
        size_bytes = encoded.manifest.size_bytes
        rate = world.devices.varied(self._index, float(world.devices.down[self._index]))
        async for sent_bytes in self._moved(size_bytes, rate, TaskPhase.DOWNLOADING):
            world.tally.down_bytes += sent_bytes
        source = Source(task.run_id, task.model_version, task.sub_model.name)
        held = world.models.receive(encoded, source, base)
        world.held[self._name] = world.in_use[self._name] = held
        return held, world.clock() - began_at

    # Training.

    def _effort(self, left_s: float | None) -> Effort:
        """Return how long the local work takes by the device's description: scoring, training, and the rest."""
        world, task, kind = self._world, self._task, self._kind
        others_s = self._slow(kind.overhead_s)
        if task.kind is TaskKind.EVALUATE or task.evaluate:
            others_s += self._slow(kind.scoring_s(world.held_out[self._index]))
        if task.kind is not TaskKind.TRAIN:
            return Effort(others_s)
        examples, epochs = max(1, world.examples[self._index]), task.plan.epochs or 1.0
        batch = min(task.plan.batch_size or world.facts.batch_size, examples)
        steps = max(1, math.ceil(epochs * math.ceil(examples / batch) - 1e-9))
        steps = min(steps, task.plan.max_steps or steps)
        shown = min(steps * batch, epochs * examples)
        training_s = self._slow(kind.task_s(shown) * world.relative_work(task))
        if task.plan.upload_reserve_s is None or left_s is None or not training_s:
            return Effort(others_s + training_s)
        step_s = training_s / steps
        ends_s = left_s - others_s - task.plan.upload_reserve_s
        most = max(1, min(steps, math.ceil(ends_s / step_s)))
        return Effort(others_s + most * step_s, most)

    def _count_examples(self, held: HeldKey | None) -> None:
        """Train once to learn of how many examples: this learning task does not tell before."""
        result = self._world.engine.begin(self._work(held, Effort(0.0), None)).result()
        header = UpdateHeader.FromString(result.header)
        self._world.examples[self._index] = header.example_count or 1
        self._world.held_out[self._index] = header.evaluation_example_count
        self._files.begin()

    def _slow(self, median_s: float) -> float:
        devices = self._world.devices
        return devices.varied(self._index, median_s * float(devices.slowness[self._index]))

    def _work(self, held: HeldKey | None, effort: Effort, left_s: float | None) -> ClientWork:
        world = self._world
        return ClientWork(
            client=self._index,
            name=self._name,
            task=self._task,
            run_id=self._task.run_id,
            folder=world.clients / self._name,
            held=None if held is None else world.models.path(held),
            most_steps=effort.most_steps,
            left_s=None if left_s is None else left_s - effort.seconds,
        )

    async def _train(self, pending: Pending, effort: Effort) -> ClientResult | None:
        """Let the training take its virtual time, and return what it really made. None: the device has failed."""
        world, began_at = self._world, self._world.clock()
        fails = world.devices.fails(self._index)
        seconds = effort.seconds * (fails or 1.0)
        try:
            await self._pass(seconds, TaskPhase.TRAINING)
        finally:
            # Out of reach it does not hear of the end of its round, and trains on.
            hears_at = world.clock() if self._reachable else self._changes_at
            self.trained_s = min(hears_at - began_at, seconds)
        if fails is not None:
            return None
        result, self._pending = pending.result(), None
        world.tally.cpu_s += result.cpu_s
        return result

    # Upload.

    async def _upload(self, header: UpdateHeader, content: bytes | None) -> None:
        """Send the update, and again from where a broken link has left it. Raises as `SimulatedUpload` does."""
        world = self._world
        await self._until_reachable()
        await asyncio.sleep(self._kind.latency_s)
        upload = await world.aggregator.begin_upload(header)
        rate = world.devices.varied(self._index, float(world.devices.up[self._index]))
        try:
            with self._files.payload.open("rb") if content is None else io.BytesIO(content) as payload:
                async for sent_bytes in self._moved(header.manifest.size_bytes, rate, TaskPhase.UPLOADING):
                    upload.append(payload.read(sent_bytes))
                    world.tally.up_bytes += sent_bytes
            await self._until_reachable()
            await upload.accept()
        except BaseException:
            # Cancelled, too: the round may end meanwhile.
            upload.discard()
            raise

    # Time.

    async def _moved(self, size_bytes: int, bytes_per_s: float, phase: TaskPhase) -> AsyncIterator[int]:
        """Move bytes over the link, about a second's worth at a time; yield how many have moved."""
        chunk = int(min(max(_CHUNK_S * bytes_per_s, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES))
        at = 0
        while at < size_bytes:
            await self._until_reachable()
            moving = min(chunk, size_bytes - at)
            done_at = self._world.clock() + moving / bytes_per_s
            if (breaks_at := self._changes_at) < done_at:
                # The chunk is lost with the link.
                await asyncio.sleep(breaks_at - self._world.clock())
                continue
            await self._pass(moving / bytes_per_s, phase, at / size_bytes)
            at += moving
            yield moving

    async def _pass(self, seconds: float, phase: TaskPhase, fraction: float = 0.0) -> None:
        """Let time pass, with a heartbeat now and then while the device can be reached. Raises `TaskEnded`."""
        world = self._world
        ends_at = world.clock() + seconds
        # A worker tells of no phase that is over at once.
        pause_s = min(SETTLED_S, self._beat_s / 2)
        while (left_s := ends_at - world.clock()) > 0:
            await asyncio.sleep(min(left_s, pause_s))
            if left_s > pause_s:
                await self._beat(phase, fraction)
            pause_s = self._beat_s

    async def _beat(self, phase: TaskPhase, fraction: float) -> None:
        if not self._reachable:
            return
        beat = await self._world.aggregator.heartbeat(self._name, self._message.token, phase, fraction)
        if beat.cancel:
            raise TaskEnded

    async def _until_reachable(self) -> None:
        while not self._reachable:
            await self._world.until(self._changes_at)

    @property
    def _reachable(self) -> bool:
        return self._world.devices.advance_one(self._index, self._world.clock())

    @property
    def _changes_at(self) -> float:
        return float(self._world.devices.changes_at[self._index])

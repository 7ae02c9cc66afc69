"""One simulated device: it polls while it can be reached, and carries out what comes (`task`)."""

from __future__ import annotations

import asyncio
import math

from fedgrpc.errors import CodecError, RoundClosed, UnknownTask, UpdateRefused
from fedgrpc.simulation.learning.aggregator import Held
from fedgrpc.simulation.learning.task import DeviceTask, TaskEnded
from fedgrpc.simulation.learning.world import World
from fedgrpc.v1 import aggregator_pb2


class SimulatedDevice:
    """A device by its index. `live` until the run has ended."""

    def __init__(self, world: World, index: int) -> None:
        self._world = world
        self._index = index
        self.name = world.devices.names[index]

    async def live(self) -> None:
        """Poll while the device can be reached, and carry out what comes."""
        world = self._world
        while True:
            while not world.devices.advance_one(self._index, world.clock()):
                await world.until(float(world.devices.changes_at[self._index]))
            message = await self._poll()
            if message is not None:
                await self._carry_out(message)
            elif world.aggregator.run.ended:
                return

    @property
    def _held(self) -> Held | None:
        key = self._world.held.get(self.name)
        return None if key is None else key.held

    async def _poll(self) -> aggregator_pb2.Task | None:
        """Wait for a task; None when the link has broken off, or the run has ended."""
        ends_at = float(self._world.devices.changes_at[self._index])
        try:
            async with asyncio.timeout_at(None if math.isinf(ends_at) else ends_at):
                return await self._world.aggregator.poll(self.name, self._held)
        except TimeoutError:
            return None

    async def _carry_out(self, message: aggregator_pb2.Task) -> None:
        world = self._world
        world.tally.tasks += 1
        task = DeviceTask(world, self._index, message)
        try:
            async with asyncio.timeout(None) as world.at_work[message.token]:
                accepted = await task.perform()
        except (TaskEnded, RoundClosed, UnknownTask, UpdateRefused, CodecError, TimeoutError):
            # Too late, or refused: the aggregator has recorded which.
            accepted = False
        finally:
            world.in_use.pop(self.name, None)
            world.at_work.pop(message.token, None)
        world.tally.trained_s += task.trained_s
        if accepted:
            world.tally.accepted += 1
            world.accepted[message.token] = self.name, task.trained_s
        else:
            world.tally.wasted_s += task.trained_s
            task.drop()
            world.task_ended(self.name)

"""The evaluator of a simulation: it scores versions on all held-out data, as a worker of that role does."""

from __future__ import annotations

import asyncio
from typing import Final

from fedgrpc.protocol.tasks import task_from_proto
from fedgrpc.simulation.learning.client_files import HeldKey
from fedgrpc.simulation.learning.client_work import ClientWork
from fedgrpc.simulation.learning.world import MOMENT_S, World
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from fedgrpc.worker.held_model import Source

EVALUATOR: Final = "evaluator"
# While it scores, devices train: its result is not asked for before that.
_SCORING_S: Final = 1.0


class Evaluator:
    """Scores one in `every` versions, and the last one; those up to `scored` have their scores."""

    def __init__(self, world: World, every: int, scored: int = 0) -> None:
        self._world = world
        self._every = every
        self._scored = scored

    async def live(self) -> None:
        """Score versions until the run has ended."""
        world, seen = self._world, self._scored
        while True:
            await self._due(seen)
            # Once the end of the round is noted: a simulation that resumes there pulls the same payload.
            await asyncio.sleep(10 * MOMENT_S)
            message = await world.aggregator.poll(EVALUATOR, None if self._held is None else self._held.held)
            if message is None:
                return
            seen = message.model_version
            await self._score(message)

    @property
    def _held(self) -> HeldKey | None:
        return self._world.held.get(EVALUATOR)

    async def _due(self, seen: int) -> None:
        """Wait for a version to score."""
        aggregator, changed = self._world.aggregator, 0
        run = aggregator.run
        while not (run.ended or run.rules.enough(run.trained) or run.version - seen >= self._every):
            changed = await aggregator.coordinator.changes.wait(changed)

    async def _score(self, message: aggregator_pb2.Task) -> None:
        world, task = self._world, task_from_proto(message)
        base = self._held
        encoded = await world.aggregator.pull(message, EVALUATOR, None if base is None else base.held)
        source = Source(task.run_id, task.model_version)
        held = world.held[EVALUATOR] = world.in_use[EVALUATOR] = world.models.receive(encoded, source, base)
        files = world.files(EVALUATOR)
        files.begin()
        work = ClientWork(
            client=None,
            name=EVALUATOR,
            task=task,
            run_id=task.run_id,
            folder=world.clients / EVALUATOR,
            held=world.models.path(held),
        )
        pending = world.engine.begin(work)
        await asyncio.sleep(_SCORING_S)
        result = pending.result()
        if result.error:
            await world.aggregator.give_back(EVALUATOR, message.token, result.error)
            return
        await world.aggregator.score(UpdateHeader.FromString(result.header))

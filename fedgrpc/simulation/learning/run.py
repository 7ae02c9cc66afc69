"""A simulation that learns, from its start to its end: aggregator, devices and an evaluator on a virtual clock.

    FOLDER/run        the data folder of the aggregator, as a deployed one has it
    FOLDER/devices    what the devices keep
    FOLDER/history.jsonl    one line for each round (`history`)

The rule: the folder is enough to go on from. What a simulation did in the round that was cut off is played again.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fedgrpc.codec.encoding import encoding_names
from fedgrpc.protocol.devices import DeviceProfile, profile_to_proto
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.simulation.devices import Devices
from fedgrpc.simulation.learning.aggregator import SimulatedAggregator
from fedgrpc.simulation.learning.client_files import HeldModels
from fedgrpc.simulation.learning.clock import VirtualClockLoop
from fedgrpc.simulation.learning.device import SimulatedDevice
from fedgrpc.simulation.learning.engine import Engine
from fedgrpc.simulation.learning.evaluator import EVALUATOR, Evaluator
from fedgrpc.simulation.learning.experiment import Experiment
from fedgrpc.simulation.learning.history import History, RoundRow
from fedgrpc.simulation.learning.world import MOMENT_S, World
from fedgrpc.storage.files import make_private
from fedgrpc.v1 import tensor_pb2
from fedgrpc.v1.aggregator_pb2 import RegisterRequest

_MIB: Final = 1 << 20

# Hears of each version, and how much of the run is over, from 0 to 1.
Show = Callable[[RoundRow, float], None]


class LearningRun:
    """One simulation of an experiment in a folder. `run` it once."""

    def __init__(self, experiment: Experiment, folder: Path, engine: Engine, seed: int = 0) -> None:
        """Open the folder, perhaps to go on from what it holds. Raises `UsageError`."""
        self._experiment = experiment
        self._folder = folder
        self._engine = engine
        self._seed = seed
        make_private(folder)
        self.history = History(folder / "history.jsonl")
        self._show: Show = lambda row, part: None

    def run(self, hours: float = math.inf, show: Show = lambda row, part: None) -> History:
        """Play until the run has ended, or so many virtual hours are over. `show` hears of each round.

        Raises `UsageError` and `TaskError` for an experiment that cannot be.
        """
        self._show = show
        loop = VirtualClockLoop(self.history.virtual_s)
        try:
            loop.run_until_complete(self._play(loop, hours * 3600))
        finally:
            loop.close()
        return self.history

    async def _play(self, loop: VirtualClockLoop, until_s: float) -> None:
        experiment = self._experiment
        make_private(self._folder / "run")
        settings = experiment.in_folder(self._folder / "run")
        aggregator = SimulatedAggregator(
            settings, loop.time, self._round_ended, experiment.learning.commit_s, self.history.abandoned
        )
        try:
            await aggregator.restart()
            facts = self._engine.facts(aggregator.wants_channels)
            devices = Devices(experiment.classes, self._seed, experiment.availability.read())
            models = HeldModels(self._folder / "devices" / "models")
            world = World(
                aggregator, self._engine, devices, models, self._folder / "devices", facts, loop.time, self._seed
            )
            self._world = world
            await self._register(world)
            aggregator.keep()
            self.history.restore(world)
            # What is there now stays: the collector need not look at it again and again.
            gc.collect()
            gc.freeze()
            await _until(aggregator.play(), self._lives(world), until_s)
        finally:
            gc.unfreeze()
            aggregator.close()

    def _lives(self, world: World) -> list[Coroutine[Any, Any, None]]:
        lives = [SimulatedDevice(world, index).live() for index in range(world.devices.count)]
        if every := self._experiment.learning.evaluate_every:
            scored = max(self.history.scores(), default=0)
            world.aggregator.scored(EVALUATOR, scored)
            lives.append(Evaluator(world, every, scored).live())
        return lives

    async def _register(self, world: World) -> None:
        """Register the devices as their workers would, and tell what they know of the model."""
        devices = world.devices
        for index, name in enumerate(devices.names):
            kind = devices.classes[devices.class_of[index]]
            profile = DeviceProfile(
                device_class=kind.device_class or kind.name, cpu_cores=1, memory_bytes=kind.memory_mb * _MIB
            )
            _register(world, name, WorkerRole.TRAINER, profile)
            world.aggregator.coordinator.workers.describe(name, world.facts.description)
        if self._experiment.learning.evaluate_every:
            _register(world, EVALUATOR, WorkerRole.EVALUATOR, DeviceProfile())
        # Once with the channels: they are the same for all.
        await world.aggregator.describe(devices.names[0], world.facts.description)

    async def _round_ended(self, round_: RoundInProgress) -> None:
        """End the tasks of a round, and note where that leaves everybody, before the next round opens."""
        world = self._world
        # A device whose update was the last one returns from its upload first.
        await asyncio.sleep(MOMENT_S)
        committed = round_.state.phase is RoundPhase.COMMITTED
        world.round_ended(frozenset(round_.state.carried), committed)
        await asyncio.sleep(MOMENT_S)
        run, settings = world.aggregator.run, world.aggregator.coordinator.settings
        world.forget_models(run.version - settings.keep_versions - 1)
        # In this order: a line that the database knows nothing of is dropped, and what is noted is settled again.
        world.begin_settling(round_.number)
        row = self.history.add(world, round_)
        world.aggregator.keep()
        world.settle()
        rounds = settings.rounds
        self._show(row, 0.0 if rounds is None else min(1.0, run.trained / rounds))


def _register(world: World, name: str, role: WorkerRole, profile: DeviceProfile) -> None:
    world.aggregator.register(
        RegisterRequest(
            worker=name,
            role=role.value,
            device=profile_to_proto(profile),
            encodings=encoding_names(),
            compressions=[tensor_pb2.COMPRESSION_NONE, tensor_pb2.COMPRESSION_ZSTD],
            local_model_parts=sorted(world.facts.parts),
        )
    )


async def _until(play: Coroutine[Any, Any, None], lives: list[Coroutine[Any, Any, None]], until_s: float) -> None:
    """Play until the run ends or the time is over. An error of any device ends it."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(None if math.isinf(until_s) else until_s):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(life) for life in lives]
                    # All that can be reached poll before the first round looks for workers, as before any other.
                    await asyncio.sleep(0)
                    await play
                    # The run has ended: workers hear of it, and the evaluator's last scores are in.
                    for task in tasks:
                        task.cancel()
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

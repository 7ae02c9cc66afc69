"""State that all devices of one simulation share, and the cost of their tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedgrpc.protocol.tasks import Task
from fedgrpc.simulation.devices import Devices
from fedgrpc.simulation.learning.aggregator import SimulatedAggregator
from fedgrpc.simulation.learning.asked import read_json, write_json
from fedgrpc.simulation.learning.client_files import ClientFiles, HeldKey, HeldModels
from fedgrpc.simulation.learning.client_work import TaskFacts
from fedgrpc.simulation.learning.engine import Engine
from fedgrpc.submodels.plan import WHOLE_MODEL, LocalModelPlan
from fedgrpc.submodels.plan_size import elements_of, relative_work

# Long enough, virtual seconds, for all that is ready to happen.
MOMENT_S: Final = 1e-6


@dataclass
class Tally:
    """Cost and outcome of all tasks so far: bytes moved, virtual and real seconds of training."""

    down_bytes: int = 0
    up_bytes: int = 0
    trained_s: float = 0.0
    wasted_s: float = 0.0
    cpu_s: float = 0.0
    tasks: int = 0
    accepted: int = 0


@dataclass
class World:
    """One simulation, as its devices see it; `clock` gives virtual seconds.

    `held` has the model that each device holds, by its name. By token, `accepted` has the devices whose updates
    wait for the end of their round and how long each has trained, and `at_work` how long those at work may be.
    `left` has the devices whose tasks are over, and whether their updates count, until `settle`.
    `examples`, and `held_out` ones to score with, are those of each device, by its index; 0: not known yet.
    """

    aggregator: SimulatedAggregator
    engine: Engine
    devices: Devices
    models: HeldModels
    folder: Path
    facts: TaskFacts
    clock: Callable[[], float]
    seed: int
    held: dict[str, HeldKey] = field(default_factory=dict)
    examples: list[int] = field(default_factory=list)
    held_out: list[int] = field(default_factory=list)
    in_use: dict[str, HeldKey] = field(default_factory=dict)
    accepted: dict[str, tuple[str, float]] = field(default_factory=dict)
    at_work: dict[str, asyncio.Timeout] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    left: dict[str, bool] = field(default_factory=dict)
    clients: Path = field(init=False)
    _files: dict[str, ClientFiles] = field(default_factory=dict)
    _works: dict[LocalModelPlan, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.examples, self.held_out = list(self.facts.examples), list(self.facts.held_out)
        self.clients = self.folder / "clients"

    def state(self) -> dict[str, Any]:
        """Return where everybody stands between two rounds, as JSON has it."""
        counted = (self.examples, self.held_out) != (list(self.facts.examples), list(self.facts.held_out))
        return {
            "seed": self.seed,
            "held": {name: [key.version, key.digest, key.sub_model] for name, key in self.held.items()},
            "devices": self.devices.state(),
            "fleet": self.aggregator.fleet_state(),
            "counted": [self.examples, self.held_out] if counted else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take everybody to where `state` had them. Raises ValueError, TypeError, KeyError and `UnknownWorker`."""
        self.devices.restore(state["devices"])
        self.aggregator.restore_fleet(state["fleet"])
        self.held = {name: HeldKey(*key) for name, key in state["held"].items()}
        if state["counted"] is not None:
            self.examples, self.held_out = state["counted"]

    def files(self, name: str) -> ClientFiles:
        """Return the files of a device."""
        if name not in self._files:
            self._files[name] = ClientFiles(self.clients / name)
        return self._files[name]

    async def until(self, time_s: float) -> None:
        """Let the time pass until then, virtual seconds."""
        await asyncio.sleep(max(0.0, time_s - self.clock()))

    def relative_work(self, task: Task) -> float:
        """Return how long a step of the local model takes, as a multiple of one of the whole model as it is."""
        plan = (task.local_model or WHOLE_MODEL).with_sub_model(task.sub_model)
        if plan == WHOLE_MODEL:
            return 1.0
        if plan not in self._works:
            coordinator = self.aggregator.coordinator
            shapes = {spec.name: spec.shape for spec in coordinator.machine.layout}
            elements = elements_of(plan, shapes, coordinator.local_models.channel_map)
            self._works[plan] = relative_work(elements.size(0.0, 0.0))
        return self._works[plan]

    def round_ended(self, tokens: frozenset[str], committed: bool) -> None:
        """Count the accepted updates of a round that has ended, and end its tasks, but for those of `tokens`."""
        for token in [each for each in self.accepted if each not in tokens]:
            name, trained_s = self.accepted.pop(token)
            self.left[name] = committed
            if not committed:
                # No version has it.
                self.tally.wasted_s += trained_s
        for token, limit in self.at_work.items():
            if token not in tokens:
                limit.reschedule(self.clock())

    def task_ended(self, name: str) -> None:
        """Note that a task of a device is over without its update."""
        self.files(name).end()
        self.left.setdefault(name, False)

    def forget_models(self, oldest: int) -> None:
        """Let devices hold no model that is older than any delta base."""
        self.held = {name: key for name, key in self.held.items() if key.version >= oldest}

    # Files, which change for good once the end of their round is noted.

    @property
    def _settling(self) -> Path:
        return self.folder / "settling.json"

    def begin_settling(self, round_: int) -> None:
        """Note what is to be settled as soon as the end of this round is noted. Raises OSError."""
        self.left = {name: accepted for name, accepted in self.left.items() if self.files(name).exist}
        if self.left:
            write_json(self._settling, [round_, self.left])

    def settle(self) -> None:
        """Take what the tasks of a round have left, and remove models that nobody holds any more."""
        self._settle(self.left)
        self.left = {}
        self.models.keep_only({*self.held.values(), *self.in_use.values()})

    def _settle(self, left: Mapping[str, bool]) -> None:
        for name, accepted in left.items():
            self.files(name).settle(accepted)
        self._settling.unlink(missing_ok=True)

    def restore_files(self, round_: int | None) -> None:
        """Take the files of all devices to the end of a round, the last one that was noted."""
        settling = read_json(self._settling)
        self._settle(settling[1] if settling is not None and settling[0] == round_ else {})
        for folder in self.clients.iterdir() if self.clients.exists() else ():
            ClientFiles(folder).restart()

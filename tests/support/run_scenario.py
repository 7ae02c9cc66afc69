"""A scenario of one run: a machine, a clock, and workers that are only names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fedgrpc.codec.layout import TensorSpec
from fedgrpc.rounds.events import Select, Selected
from fedgrpc.rounds.history import Timings
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.version import Version
from fedgrpc.runs.events import (
    Effect,
    Event,
    OpenRound,
    RoundEnded,
    RoundOpened,
    TasksGiven,
    UpdateAccepted,
    UpdatesMerged,
    VersionTaken,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge, Scores
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.task_context import Report, TaskContext

LAYOUT = (TensorSpec("w", "float32", (2,)),)
REPORT = Report(
    example_count=10,
    steps=1,
    metrics={"loss": 0.5},
    evaluation_metrics={},
    evaluation_example_count=0,
    timings=Timings(),
    upload_bytes=8,
    peak_memory_bytes=0,
)


@dataclass
class ListedFleet:
    """A fleet of workers that all poll, but for those that are away."""

    names: str
    away: set[str] = field(default_factory=set)
    slow: frozenset[str] = frozenset()

    def idle_trainers(self, busy: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.away and name not in busy)

    def live_trainers(self, now: float, but: Collection[str] = ()) -> int:
        return sum(name not in self.away and name not in but for name in self.names)

    def doubted(self, now: float) -> frozenset[str]:
        return self.slow


class RunScenario:
    """Tells a machine what happens, as the shell would; the token of worker "a" in round 3 is "a3"."""

    def __init__(self, names: str = "abc", rounds: int = 10, evaluate: bool = False, **policy: object) -> None:
        settings = {"min_workers": 1, "selection_window_s": 0.0, "deadline_s": 100.0, "lease_s": 10.0, **policy}
        rules = RunRules(RoundPolicy(**settings), rounds, evaluate)  # type: ignore[arg-type]
        self.machine = RunMachine(rules, "run", 0.0)
        self.fleet = ListedFleet(names)
        self.now = 0.0

    def __call__(self, event: Event) -> tuple[Effect, ...]:
        return self.machine.apply(event, self.now)

    def model(self, version: int = 1) -> RunScenario:
        """The run has a model."""
        self(VersionTaken(Version(version, 0, b"digest", trained=version - 1), LAYOUT))
        return self

    def open(self, chosen: str | None = None) -> RunScenario:
        """Open a round, with a task for each of the idle workers, or for those named."""
        if self.machine.round is None:
            step = self.machine.next_step(0.0, self.now)
            assert isinstance(step, OpenRound), step
            self(RoundOpened(step.round))
        select = next(
            e for e in self(self.machine.workers_available(self.fleet, self.now)) if isinstance(e, Select)
        )
        names = self.machine.idle_trainers(self.fleet, self.now) if chosen is None else tuple(chosen)
        names = tuple(name for name in names if name not in select.exclude)[: select.count]
        tasks = tuple((self.token(name), name) for name in names)
        contexts = {token: TaskContext(device_class=f"class of {name}") for token, name in tasks}
        self(TasksGiven(Selected(tasks), contexts))
        return self

    def token(self, worker: str) -> str:
        return f"{worker}{self.machine.current.number}"

    def accept(self, *tokens: str) -> tuple[Effect, ...]:
        """These updates are accepted; the effects of the last one."""
        effects: tuple[Effect, ...] = ()
        for token in tokens:
            effects = self(UpdateAccepted(token, 10.0, REPORT))
        return effects

    def merged(self, scored: bool = False) -> UpdatesMerged:
        """The event that ends the commit of the round in progress."""
        state = self.machine.current.state
        number = self.machine.version + 1
        version = Version(number, state.number, b"digest", trained=self.machine.trained + 1)
        weights = dict.fromkeys(state.accepted, 10.0)
        return UpdatesMerged(
            version,
            LAYOUT,
            Merge(
                weights,
                dict.fromkeys(weights, 1.0),
                scores=Scores({"loss": 0.5} if scored else {}),
                training_metrics={"loss": 0.5},
            ),
            0.25,
        )

    def commit(self, scored: bool = False) -> RunScenario:
        """The round has its version, and is left behind."""
        self(self.merged(scored))
        self(RoundEnded(0.0))
        return self

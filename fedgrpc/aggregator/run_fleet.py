"""The fleet as one run sees it, and how the runs of a process share it.

The rule: a run sees the workers that may serve it. Idle ones it gets only as `fedgrpc.runs.scheduler` shares them
out, and never one that holds a task of another run, or is just being given one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.errors import UsageError, WrongIdentity
from fedgrpc.protocol.facts import lasting_facts, passing_facts
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.eligibility import EVERYBODY, MINUTES_OF_DAY, eligible, parse
from fedgrpc.runs.events import RunPhase
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.scheduler import Demand, share_out


class Sharing(Protocol):
    """Shares one fleet out to the runs of a process."""

    @property
    def alone(self) -> bool:
        """True if there is one run alone."""

    def given_to(self, run: RunFleet) -> frozenset[str]:
        """Names of the idle workers that are for this run now."""


class RunFleet:
    """The fleet as one run sees it: a `FleetView`, and who may serve the run."""

    def __init__(self, fleet: WorkerRegistry, coordinator: Coordinator, sharing: Sharing, is_own: bool) -> None:
        """`is_own`: the run is the one that the process was started with. Raises `UsageError` for `requires`."""
        settings = coordinator.settings
        self._fleet = fleet
        self.coordinator = coordinator
        self._sharing = sharing
        self.is_own = is_own
        self.share = settings.share
        self._requires = parse(settings.requires)
        self._for_everybody = self._requires == EVERYBODY
        # Of workers that serve many runs: those that are ready for this one, and why others refuse it.
        self.ready: set[str] = set()
        self.refusals: dict[str, str] = {}
        self.binds: Callable[[], bool] = lambda: is_own
        self._waiting_since: float | None = None
        # It has its workers, and is about to give them tasks.
        self._choosing = False

    @property
    def machine(self) -> RunMachine:
        """The run."""
        return self.coordinator.machine

    def may_serve(self, worker: Worker) -> bool:
        """Return whether the worker may have tasks of the run now."""
        if not worker.registration.many_runs and not self.binds():
            return False
        return not self.refusal(worker)

    def refusal(self, worker: Worker) -> str:
        """Say why the worker does not serve the run; "": it may."""
        if worker.name in self.refusals:
            return self.refusals[worker.name]
        try:
            self.coordinator.negotiation.check(worker.registration)
            self.coordinator.settings.roles.check(worker.registration)
        except (UsageError, WrongIdentity) as error:
            return str(error)
        if self._for_everybody:
            return ""
        minute = int(time.time() // 60) % MINUTES_OF_DAY
        facts = lasting_facts(worker.name, worker.registration.device) | passing_facts(worker.conditions, minute)
        return "" if eligible(self._requires, facts) else f"not eligible: {self.coordinator.settings.requires}"

    def is_ready(self, worker: Worker) -> bool:
        """Return whether the worker knows of the run, so that it can be given tasks."""
        return self.is_own or not worker.registration.many_runs or worker.name in self.ready

    # What the run asks.

    def idle_trainers(self, busy: Collection[str]) -> tuple[str, ...]:
        """Names of the trainers that poll and are for this run, but for the busy ones."""
        if self._has_all:
            return self._fleet.idle_trainers(busy)
        given = self._sharing.given_to(self)
        # In the order of registration, which decides who is asked first.
        idle = (name for name in self._fleet.idle_trainers(busy) if name in given)
        return tuple(name for name in idle if self.is_ready(self._fleet.get(name)))

    @property
    def _has_all(self) -> bool:
        """True if every worker may serve the run, and no other run wants any: the fleet itself answers sooner."""
        return self.is_own and self._sharing.alone and self._for_everybody and self.share.quota is None

    def live_trainers(self, now: float, but: Collection[str] = ()) -> int:
        """Count the trainers that are alive and may serve the run, without those named."""
        if self._has_all:
            return self._fleet.live_trainers(now, but)
        return sum(
            not worker.evaluator and worker.name not in but and self.may_serve(worker)
            for worker in self._fleet
            if self._fleet.alive(worker, now)
        )

    def doubted(self, now: float) -> frozenset[str]:
        """Names of the workers that held up rounds again and again."""
        return self._fleet.doubted(now)

    def live_evaluators(self, now: float) -> list[Worker]:
        """Evaluators that are alive and may serve the run."""
        evaluators = self._fleet.live_evaluators(now)
        return evaluators if self._has_all else [worker for worker in evaluators if self.may_serve(worker)]

    @contextmanager
    def reserving(self, names: Collection[str]) -> Iterator[None]:
        """Give none of these workers to another run while the block runs."""
        self._choosing = True
        try:
            with self._fleet.reserving(names):
                yield
        finally:
            self._choosing = False

    # What the scheduler asks.

    def demand(self, now: float, supply: int) -> Demand:
        """Return how many workers the run wants, of whom `supply` are alive."""
        run, round_ = self.machine, self.machine.round
        wanted = needed = 0
        if round_ is not None and round_.open and not self._choosing and not run.ended:
            wanted, needed = self._wanted(supply)
        paused = round_ is not None and round_.state.phase is RoundPhase.SELECTING and run.phase is RunPhase.PAUSED
        if not wanted or paused:
            self._waiting_since, wanted = None, 0
        elif self._waiting_since is None:
            self._waiting_since = now
        waited_s = 0.0 if self._waiting_since is None else now - self._waiting_since
        left = math.inf
        if run.rules.rounds is not None:
            left = float(max(0, run.rules.rounds - run.trained) * max(1, wanted, len(run.leases)))
        name = self.coordinator.settings.run_name
        return Demand(name, wanted, needed, supply, len(run.leases), left, waited_s, run.started_at, self.share)

    def _wanted(self, supply: int) -> tuple[int, int]:
        """Return how many more workers the round would take now, and how many of them it needs at least."""
        round_ = self.machine.current
        state, policy = round_.state, round_.state.policy
        brought = state.accepted_count + state.at_work_count
        if state.asked:
            return state.asked, 1
        if state.phase is RoundPhase.SELECTING:
            if round_.kind is TaskKind.INITIALIZE:
                # The largest of all gives the first model. A run that has none still wants one.
                return max(1, supply), 1
            return max(0, policy.ask(policy.aim(supply)) - brought), max(1, policy.needed_idle - brought)
        if state.phase is not RoundPhase.REPORTING:
            return 0, 0
        if policy.buffer_size is not None:
            return max(0, policy.aim(supply) - state.at_work_count), 1
        return max(0, state.missing_count), 1


class FleetSharing:
    """Shares one fleet out to runs. `runs` are those of the process now."""

    def __init__(
        self, fleet: WorkerRegistry, runs: Callable[[], Iterable[RunFleet]], clock: Callable[[], float]
    ) -> None:
        self._fleet = fleet
        self._runs = runs
        self._clock = clock

    @property
    def alone(self) -> bool:
        """See `Sharing.alone`."""
        return sum(1 for _ in self._runs()) == 1

    def demands(self) -> list[Demand]:
        """Return what each run wants now."""
        now = self._clock()
        return [run.demand(now, run.live_trainers(now)) for run in self._runs()]

    def given_to(self, run: RunFleet) -> frozenset[str]:
        """See `Sharing.given_to`. Wakes workers that are for a run that they do not know yet."""
        given = self.given()
        name = run.coordinator.settings.run_name
        mine = frozenset(worker for worker, other in given.items() if other == name)
        for worker in mine:
            if not run.is_ready(self._fleet.get(worker)):
                self._fleet.get(worker).woken.set()
        return mine

    def given(self) -> dict[str, str]:
        """Return the name of the run that each idle worker is for."""
        runs = list(self._runs())
        busy = {name for run in runs for name in run.machine.leases} | self._fleet.reserved
        idle = {}
        for name in self._fleet.idle_trainers(busy):
            worker = self._fleet.get(name)
            able = {run.coordinator.settings.run_name for run in runs if run.may_serve(worker)}
            if able:
                idle[name] = able
        return share_out(self.demands(), idle)

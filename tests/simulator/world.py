"""One simulated world: an aggregator, workers, a network and faults, all from one seed.

Faults come and go for `FAULTY_S` seconds; then the world is quiet, and the run has to go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgrpc.errors import FedgrpcError
from fedgrpc.simulation.loop import Life, Process, VirtualLoop
from tests.simulator.aggregator import Aggregator
from tests.simulator.faults import Choosing, Faults, draw_faults, draw_habits, draw_policy
from tests.simulator.network import Network
from tests.simulator.watch import Violation, Watch
from tests.simulator.worker import Worker

FAULTY_S = 60.0
QUIET_S = 400.0
_TRACE_LENGTH = 40


@dataclass(frozen=True)
class Outcome:
    """What one seed came to; `violation` empty: everything held."""

    seed: int
    violation: str
    trace: tuple[str, ...]
    rounds: int
    abandoned: int
    updates: int
    stale_updates: int
    crashes: int
    ledger_entries: int
    virtual_s: float


class World:
    """Made of a seed; `play` it once."""

    def __init__(self, seed: int, make_aggregator: Callable[[World], Aggregator] = Aggregator) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.loop = VirtualLoop()
        self.faults = draw_faults(self.rng)
        habits = [draw_habits(self.rng, self.faults.clock_drift) for _ in range(self.rng.integers(2, 7))]
        self.policy = draw_policy(self.rng, habits)
        self.choosing = Choosing(oort=self.rng.random() < 0.5, learned_deadline=self.rng.random() < 0.5)
        # Drawn from the seed alone, so that worlds of a seed stay what they were.
        self.private = seed % 2 == 0 and self.policy.late == "discard"
        self.watch = Watch(self)
        self.wall_offset_s = 0.0
        self.committed_when_quiet = 1 << 30
        self.crashes = 0
        self._trace: deque[tuple[Any, ...]] = deque(maxlen=_TRACE_LENGTH)
        self._tokens = 0
        self.aggregator = make_aggregator(self)
        self.network = Network(self.loop, self.faults, self.rng, self.aggregator.serve)
        self.workers = [Worker(self, chr(ord("a") + index), habit) for index, habit in enumerate(habits)]

    @property
    def wall_now(self) -> float:
        """The aggregator's wall clock, which may be set while it is down."""
        return self.loop.now + self.wall_offset_s

    def new_token(self) -> str:
        """Never the same twice."""
        self._tokens += 1
        return f"t{self._tokens}"

    def trace(self, who: str, *what: object) -> None:
        """Remember the last things that happened."""
        self._trace.append((self.loop.now, who, *what))

    def play(self) -> Outcome:
        """The whole story of this seed."""
        violation = ""
        try:
            self._start()
            self.loop.run(FAULTY_S + QUIET_S, self._look)
            self.watch.at_end()
        except Violation as found:
            violation = str(found)
        except (FedgrpcError, AssertionError, KeyError) as surprise:
            violation = f"no surprise: {type(surprise).__name__}: {surprise}"
        return Outcome(
            self.seed,
            violation,
            tuple(_line(entry) for entry in self._trace) if violation else (),
            rounds=len(self.aggregator.disk.versions),
            abandoned=self.watch.abandoned,
            updates=self.watch.updates,
            stale_updates=self.watch.stale_updates,
            crashes=self.crashes,
            ledger_entries=len(self.aggregator.disk.releases),
            virtual_s=self.loop.now,
        )

    def _look(self) -> bool:
        self.watch.look()
        return not self.watch.went_on()

    def _start(self) -> None:
        faults, always = self.faults, Life()
        self.aggregator.start()
        for worker in self.workers:
            worker.start()
            if faults.worker_crash_every_s is not None:
                self.loop.spawn(self._crash_worker(worker, faults.worker_crash_every_s), always)
            if faults.partition_every_s is not None:
                self.loop.spawn(self._partition(worker, faults.partition_every_s), always)
        if faults.aggregator_crash_every_s is not None:
            self.loop.spawn(self._crash_aggregator(faults.aggregator_crash_every_s), always)
        self.loop.call_at(FAULTY_S, self._calm_down)

    def _calm_down(self) -> None:
        self.trace("world", "quiet")
        self.network.faults = Faults(delay_s=min(self.faults.delay_s, 0.1))
        self.committed_when_quiet = len(self.aggregator.disk.versions)

    def _until_next(self, mean_s: float) -> float | None:
        """Seconds to the next fault; None: the time of faults is over."""
        seconds = float(self.rng.exponential(mean_s))
        return seconds if self.loop.now + seconds < FAULTY_S else None

    def _crash_worker(self, worker: Worker, mean_s: float) -> Process[None]:
        while (seconds := self._until_next(mean_s)) is not None:
            yield self.loop.sleep(seconds)
            self.trace(worker.name, "killed")
            self.crashes += 1
            worker.crash()
            yield self.loop.sleep(self.rng.exponential(self.faults.down_s))
            worker.start()

    def _partition(self, worker: Worker, mean_s: float) -> Process[None]:
        while (seconds := self._until_next(mean_s)) is not None:
            yield self.loop.sleep(seconds)
            self.trace(worker.name, "cut off")
            self.network.cut_off.add(worker.name)
            yield self.loop.sleep(self.rng.exponential(self.faults.partition_s))
            self.trace(worker.name, "reachable")
            self.network.cut_off.discard(worker.name)

    def _crash_aggregator(self, mean_s: float) -> Process[None]:
        while (seconds := self._until_next(mean_s)) is not None:
            yield self.loop.sleep(seconds)
            self._kill_aggregator()

    def may_kill_aggregator(self, within_s: float) -> None:
        """It is about to write, and may not come to the end of it."""
        if self.rng.random() < self.network.faults.crash_at_write:
            self.loop.call_at(self.loop.now + within_s * self.rng.random(), self._kill_aggregator)

    def _kill_aggregator(self) -> None:
        if not self.aggregator.life.alive:
            return
        self.trace("aggregator", "killed")
        self.crashes += 1
        self.aggregator.crash()
        self.watch.crashed()
        self.wall_offset_s += self.rng.uniform(-1, 1) * self.faults.wall_step_s
        self.loop.call_at(self.loop.now + self.rng.exponential(self.faults.down_s), self._restart_aggregator)

    def _restart_aggregator(self) -> None:
        self.trace("aggregator", "restarted")
        self.aggregator.start()


def _line(entry: tuple[Any, ...]) -> str:
    time, who, *what = entry
    return f"{time:9.3f} {who:<10} {' '.join(map(str, what))}"

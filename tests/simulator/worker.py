"""A simulated worker: polls, pulls, trains, spools, uploads; killed and restarted at any instant.

Its spool is the disk: a finished training survives until the aggregator has said what became of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedgrpc.errors import LinkError, RoundClosed, UnknownTask, UpdateRefused, WrongOffset
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.simulation.loop import Life, Process, Wait
from tests.simulator.faults import Habits
from tests.simulator.messages import (
    Assignment,
    GiveBack,
    Heartbeat,
    Held,
    Poll,
    Push,
    Query,
    Request,
    UpdateId,
)

if TYPE_CHECKING:
    from tests.simulator.world import World

_TIMEOUT_S = 3.0
_POLL_S = 10.0


@dataclass(frozen=True)
class Spooled:
    """A finished training that waits to be delivered."""

    token: str
    update: UpdateId
    bad: bool


class Worker:
    """One device; `spool` and `serial` are its disk."""

    def __init__(self, world: World, name: str, habits: Habits) -> None:
        self.name = name
        self.spool: Spooled | None = None
        self.serial = 0
        self.life = Life()
        self._world = world
        self._habits = habits
        self._cancelled = False

    def start(self) -> None:
        """Begin a new incarnation."""
        self.life = Life()
        self._world.loop.spawn(self._live(), self.life)

    def crash(self) -> None:
        """Lose everything but the disk."""
        self.life.alive = False

    def _live(self) -> Process[None]:
        while True:
            if self.spool is not None:
                yield from self._deliver(self.spool)
            try:
                assignment = yield from self._call(Poll(self.name), _POLL_S + _TIMEOUT_S)
            except LinkError:
                yield self._sleep(0.5)
                continue
            if assignment is not None:
                self._world.watch.told(assignment)
                yield from self._work(assignment)

    def _work(self, assignment: Assignment) -> Process[None]:
        """Pull, train, spool, deliver; or give the task back."""
        habits, rng = self._habits, self._world.rng
        token = assignment.token
        if not (yield from self._busy(token, TaskPhase.DOWNLOADING, habits.download_s * rng.uniform(0.5, 1.5))):
            return
        if rng.random() < self._world.network.faults.failure:
            yield from self._patiently(GiveBack(self.name, token))
            return
        if not (yield from self._busy(token, TaskPhase.TRAINING, habits.train_s * rng.uniform(0.5, 1.5))):
            return
        self.serial += 1
        bad = bool(rng.random() < self._world.network.faults.bad_update)
        self.spool = Spooled(token, UpdateId(self.name, self.serial), bad)
        if bad:
            self._world.watch.refused(self.spool.update)
        self._world.trace(self.name, "spooled", token)

    def _busy(self, token: str, phase: TaskPhase, seconds: float) -> Process[bool]:
        """Spend the time and report now and then; False once the task is to stop."""
        loop, life = self._world.loop, self.life
        interval_s = self._world.policy.lease_s / 3
        self._cancelled = False
        until = loop.now + seconds / self._habits.clock_rate
        while True:
            loop.spawn(self._beat(token, phase), life)
            yield self._sleep(min(interval_s, max(0.0, (until - loop.now) * self._habits.clock_rate)))
            if self._cancelled or loop.now >= until:
                return not self._cancelled

    def _beat(self, token: str, phase: TaskPhase) -> Process[None]:
        try:
            cancel = yield from self._call(Heartbeat(self.name, token, phase))
        except LinkError:
            return
        except UnknownTask:
            cancel = True
        self._cancelled |= cancel

    def _deliver(self, spooled: Spooled) -> Process[None]:
        """Upload, from wherever the aggregator is, until it says what becomes of the update."""
        token = spooled.token
        try:
            held: Held = yield from self._patiently(Query(self.name, token))
            while not held.complete:
                yield self._sleep(self._habits.chunk_s * self._world.rng.uniform(0.5, 1.5))
                chunk = Push(self.name, token, spooled.update, spooled.bad, held.chunks, self._habits.chunks)
                try:
                    held = yield from self._call(chunk)
                except (LinkError, WrongOffset):
                    held = yield from self._patiently(Query(self.name, token))
        except (RoundClosed, UnknownTask, UpdateRefused) as error:
            self._world.trace(self.name, "dropped", token, str(error))
        else:
            self._world.trace(self.name, "delivered", token)
        self.spool = None

    def _patiently(self, request: Query | GiveBack) -> Process[Held]:
        while True:
            try:
                held: Held = yield from self._call(request)
                return held
            except LinkError:
                yield self._sleep(0.5)
            except (RoundClosed, UnknownTask):
                if isinstance(request, GiveBack):
                    return Held(0, complete=False)
                raise

    def _call(self, request: Request, timeout_s: float = _TIMEOUT_S) -> Process[Any]:
        return (yield from self._world.network.call(request, timeout_s / self._habits.clock_rate))

    def _sleep(self, seconds: float) -> Wait:
        return self._world.loop.sleep(seconds / self._habits.clock_rate)

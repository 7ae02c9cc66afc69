"""Fleet: the workers, and which of them are alive, idle and trusted. Pure.

The rule: nothing here belongs to one run. A run itself knows who holds its tasks, and what each did in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from fedgrpc.errors import Exhausted, UnknownWorker
from fedgrpc.rounds.history import Punctuality
from fedgrpc.rounds.round import Round

# One in so many workers is forgotten at a time, so that not every new one has to make room.
_FORGOTTEN_SHARE = 100


class FleetMember(Protocol):
    """State of one worker in a fleet; `last_seen` by the aggregator's clock, seconds; `polls`: its open polls.

    `left`: it said that it ends, and has not been heard of since. `trust` says whether rounds may count on it.
    `delivered`: some run has accepted an update of it.
    """

    name: str
    evaluator: bool
    last_seen: float
    polls: int
    left: bool
    delivered: bool
    trust: Punctuality


M = TypeVar("M", bound=FleetMember)


class Fleet(Generic[M]):
    """Every worker that is known.

    One that has not left is alive while it polls, and for `away_after_s` after it was heard.
    """

    def __init__(self, max_workers: int, away_after_s: float) -> None:
        self._workers: dict[str, M] = {}
        self._max_workers = max_workers
        self._away_after_s = away_after_s
        self._polls_kept_until = -math.inf
        self._doubted: set[str] = set()
        self._reserved: Counter[str] = Counter()

    def __iter__(self) -> Iterator[M]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, name: str) -> M:
        """Return the worker of that name. Raises `UnknownWorker`."""
        try:
            return self._workers[name]
        except KeyError:
            raise UnknownWorker(f"worker {name[:80]!r} has not registered here") from None

    def find(self, name: str) -> M | None:
        """Return the worker of that name; None where none has registered under it."""
        return self._workers.get(name)

    def make_room(self, name: str, keep: Container[str], now: float) -> list[str]:
        """Forget workers for a new one called `name`, if there is no room; the names of those forgotten.

        Only those that never delivered an update are, and none that is reserved or in `keep`: they lose nothing
        but their place, and register again if they are there. Those that poll give way only now and then.

        Raises `Exhausted` when there is no worker to forget.
        """
        if name in self._workers or len(self._workers) < self._max_workers:
            return []
        idle = [w for w in self if not (w.delivered or w.name in keep or w.name in self._reserved)]
        silent = sorted((w for w in idle if not w.polls), key=lambda w: (self.alive(w, now), w.last_seen))
        count = max(1, self._max_workers // _FORGOTTEN_SHARE)
        if not silent and now >= self._polls_kept_until:
            self._polls_kept_until = now + self._away_after_s
            silent = sorted(idle, key=lambda w: w.last_seen)
        if not silent:
            why = f"the limit of {self._max_workers} workers is reached"
            raise Exhausted(why, retry_after_s=self._away_after_s)
        return [self._workers.pop(worker.name).name for worker in silent[:count]]

    @contextmanager
    def reserving(self, names: Collection[str]) -> Iterator[None]:
        """Forget none of these workers while the block runs: they are about to be given tasks."""
        self._reserved.update(names)
        try:
            yield
        finally:
            self._reserved -= Counter(names)

    @property
    def reserved(self) -> frozenset[str]:
        """Names of the workers that are not forgotten now."""
        return frozenset(self._reserved)

    def alive(self, worker: M, now: float) -> bool:
        """Return whether the worker polls, or was heard of lately, and has not left."""
        return not worker.left and (worker.polls > 0 or now - worker.last_seen < self._away_after_s)

    def idle_trainers(self, busy: Container[str] = ()) -> tuple[str, ...]:
        """Names of the trainers that poll, but for the busy ones."""
        return tuple(w.name for w in self if w.polls and not w.left and w.name not in busy and not w.evaluator)

    def live_trainers(self, now: float, but: Container[str] = ()) -> int:
        """Count the trainers that are alive, without those named in `but`."""
        return sum(self.alive(w, now) and not w.evaluator and w.name not in but for w in self)

    def live_evaluators(self, now: float) -> list[M]:
        """The evaluators that are alive."""
        return [w for w in self if w.evaluator and self.alive(w, now)]

    def any_alive_but(self, names: Container[str], now: float) -> bool:
        """Return whether a worker is alive that is not one of these."""
        return any(self.alive(worker, now) and worker.name not in names for worker in self)

    def doubted(self, now: float) -> frozenset[str]:
        """Names of the workers that rounds cannot count on; there mostly are none."""
        if self._doubted:
            self._doubted = {name for name in self._doubted if self._is_doubted(name, now)}
        return frozenset(self._doubted)

    def _is_doubted(self, name: str, now: float) -> bool:
        worker = self.find(name)
        return worker is not None and worker.trust.doubted(now)

    def judge(self, round_: Round, now: float) -> list[str]:
        """Note who held up a round that has ended; names of those that are doubted for it."""
        doubted = []
        for token, task in round_.tasks.items():
            worker = self._workers.get(task.worker)
            if worker is not None and token not in round_.carried:
                worker.trust = worker.trust.after(round_, task, now)
                if worker.trust.doubted(now):
                    doubted.append(worker.name)
        self._doubted.update(doubted)
        return doubted

    def recall(self, name: str, last_seen: float, trust: Punctuality) -> None:
        """Take a worker to where a former process has left it. Raises `UnknownWorker`."""
        worker = self.get(name)
        worker.last_seen, worker.trust = last_seen, trust
        self._doubted.add(name)


class FleetView(Protocol):
    """Questions of a run to its fleet, of whatever kind."""

    def idle_trainers(self, busy: Collection[str]) -> tuple[str, ...]:
        """Names of the trainers that poll, but for the busy ones."""

    def live_trainers(self, now: float, but: Collection[str] = ()) -> int:
        """Count the trainers that are alive, without those named."""

    def doubted(self, now: float) -> frozenset[str]:
        """Names of the workers that held up rounds again and again."""

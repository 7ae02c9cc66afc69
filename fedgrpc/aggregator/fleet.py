"""Who has registered, who is alive, who is idle. Kept on the event loop; nothing here waits or writes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedgrpc.errors import Exhausted, UnknownWorker, UsageError
from fedgrpc.rounds.history import Histories, WorkerHistory
from fedgrpc.rpc.identity import Session
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import WORKER_ROLE_AGGREGATOR, WORKER_ROLE_EVALUATOR

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_REGISTRATION_BYTES = 16 << 10


@dataclass
class Holder:
    """The process that speaks for a worker; `session` is None before one has registered.

    `called` is when it last called, seconds. `hung_up`: its poll broke off, and it has not called since.
    `challenge` is set by its next call, while another process asks for its place.
    """

    session: Session | None = None
    peer: str = ""
    called: float = 0.0
    hung_up: bool = False
    challenge: asyncio.Event | None = None
    refused: Session | None = None

    def heard(self, now: float) -> None:
        """It has called."""
        self.called, self.hung_up = now, False
        if self.challenge is not None:
            self.challenge.set()


@dataclass
class Worker:
    """A registered worker; `last_seen` is the aggregator's clock, seconds; `polls` counts its open polls.

    `held` is what it said to hold: a version, and the SHA-256 of the payload that made it. `left`: it said that it
    ends, and has not been heard of since. `holder` is the process that speaks for it.
    """

    registration: RegisterRequest
    last_seen: float
    history: WorkerHistory = field(default_factory=WorkerHistory)
    polls: int = 0
    held: tuple[int, bytes] | None = None
    token: str | None = None
    told_of_end: bool = False
    left: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    holder: Holder = field(default_factory=Holder)
    name: str = field(init=False)
    evaluator: bool = field(init=False)

    def __post_init__(self) -> None:
        self.renew(self.registration)

    def renew(self, registration: RegisterRequest) -> None:
        """Take what it says of itself now. What the whole fleet is asked for again and again is read once."""
        self.registration = registration
        self.name = registration.worker
        self.evaluator = registration.role == WORKER_ROLE_EVALUATOR

    def heard(self, now: float) -> None:
        """It has called."""
        self.last_seen, self.left = now, False

    @property
    def leads(self) -> bool:
        """Whether it is an aggregator with workers of its own."""
        return self.registration.role == WORKER_ROLE_AGGREGATOR


class Fleet:
    """Every worker that has registered.

    One that has not left is alive while it polls, and for `away_after_s` after it was heard.
    """

    def __init__(self, max_workers: int, away_after_s: float) -> None:
        self._workers: dict[str, Worker] = {}
        self._max_workers = max_workers
        self._away_after_s = away_after_s

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, name: str) -> Worker:
        """The worker of that name. Raises `UnknownWorker`."""
        try:
            return self._workers[name]
        except KeyError:
            raise UnknownWorker(f"worker {name!r} has not registered here") from None

    def knows(self, registration: RegisterRequest, session: Session | None = None) -> bool:
        """Whether this very registration, by this process, is in force."""
        worker = self._workers.get(registration.worker)
        return worker is not None and worker.registration == registration and worker.holder.session == session

    def check(self, registration: RegisterRequest) -> None:
        """Raise `UsageError` or `Exhausted` where `register` will."""
        name = registration.worker
        if not _NAME.fullmatch(name):
            raise UsageError(f"a worker's name is 1 to 64 of letters, digits, '.', '_' and '-', not {name[:80]!r}")
        if (size_bytes := registration.ByteSize()) > _MAX_REGISTRATION_BYTES:
            raise UsageError(f"a registration of {size_bytes} bytes; allowed are {_MAX_REGISTRATION_BYTES}")
        if name not in self._workers and len(self._workers) >= self._max_workers:
            raise Exhausted(f"the limit of {self._max_workers} workers is reached")

    def register(self, registration: RegisterRequest, now: float) -> Worker:
        """Add a worker, or renew what it says of itself. Raises `UsageError` and `Exhausted`."""
        self.check(registration)
        worker = self._workers.setdefault(registration.worker, Worker(registration, now))
        worker.renew(registration)
        worker.heard(now)
        return worker

    def restore(
        self, registration: RegisterRequest, history: WorkerHistory, now: float, session: Session | None = None
    ) -> None:
        """Add a worker known from before a restart; it counts as away until it is heard of.

        Its name stays its own for as long as that of one that has just called: it may be about to.
        """
        last_seen = now - 2 * self._away_after_s
        holder = Holder(session, called=now, hung_up=True)
        self._workers[registration.worker] = Worker(registration, last_seen, history, holder=holder)

    def find(self, name: str) -> Worker | None:
        """The worker of that name; None where nobody has registered under it."""
        return self._workers.get(name)

    def holds_name(self, worker: Worker, now: float) -> bool:
        """Whether no other device may take the worker's name."""
        lately = now - worker.holder.called < self._away_after_s
        return self.alive(worker, now) or (lately and not worker.left)

    @contextmanager
    def polling(self, worker: Worker) -> Iterator[None]:
        """While the block runs, the worker polls."""
        worker.polls += 1
        try:
            yield
        finally:
            worker.polls -= 1

    def alive(self, worker: Worker, now: float) -> bool:
        """Whether the worker polls, or was heard of lately, and has not left."""
        return not worker.left and (worker.polls > 0 or now - worker.last_seen < self._away_after_s)

    def idle_trainers(self) -> tuple[str, ...]:
        """Names of the trainers that poll and hold no task."""
        return tuple(w.name for w in self if w.polls and not w.left and w.token is None and not w.evaluator)

    def histories(self) -> Histories:
        """What is remembered of each trainer that has had a task."""
        return {w.name: w.history for w in self if w.history.selected and not w.evaluator}

    def release(self, tokens: Iterable[str]) -> None:
        """Whoever held one of these tasks holds none."""
        over = frozenset(tokens)
        for worker in self:
            if worker.token in over:
                worker.token = None

    def remember(self, histories: Histories) -> None:
        """Replace the histories of these workers."""
        for name, history in histories.items():
            self.get(name).history = history

    def live_trainers(self, now: float) -> int:
        """How many trainers are alive."""
        return sum(self.alive(w, now) and not w.evaluator for w in self)

    def live_evaluators(self, now: float) -> list[Worker]:
        """The evaluators that are alive."""
        return [w for w in self if w.evaluator and self.alive(w, now)]

    def still_unaware(self, now: float) -> bool:
        """Whether a worker is alive that has not been told of the end of the run."""
        return any(self.alive(worker, now) and not worker.told_of_end for worker in self)

    def wake_concerned(self) -> None:
        """Let the open polls of those look again whom a new version or the end of a round concerns."""
        for worker in self:
            if worker.evaluator or worker.token is not None:
                worker.woken.set()

    def wake_all(self) -> None:
        """Let every open poll look again."""
        for worker in self:
            worker.woken.set()

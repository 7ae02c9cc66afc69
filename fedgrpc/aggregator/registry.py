"""The workers that have registered, the process that speaks for each, and their open polls."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from fedgrpc.errors import Exhausted, UsageError
from fedgrpc.rounds.history import Punctuality
from fedgrpc.rpc.identity import Session
from fedgrpc.runs.fleet import Fleet
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import WORKER_ROLE_AGGREGATOR, WORKER_ROLE_EVALUATOR, DeviceConditions

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_REGISTRATION_BYTES = 16 << 10
# Flapping links leave polls behind that no worker waits for.
_MAX_POLLS = 4
# Changed registrations of one name: each is written to the disk.
_CHANGES = 10
_CHANGE_S = 2.0

# Open polls that are answered at once, and in how many steps a crowd of them is.
_AT_ONCE: Final = 16
_STEPS: Final = 64
_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1
# After each step, this many times as long for everything else as the loop was late.
_REST: Final = 2.0

_TRUSTED = Punctuality()


@dataclass
class Allowance:
    """`_CHANGES` changes at once, and one more every `_CHANGE_S`."""

    left: float = _CHANGES
    counted_at: float = 0.0

    def take(self, now: float) -> None:
        """Take one. Raises `Exhausted` when none is left."""
        left = min(_CHANGES, self.left + max(0.0, now - self.counted_at) / _CHANGE_S)
        if left < 1:
            wait_s = (1 - left) * _CHANGE_S
            raise Exhausted(f"this worker registers too often; try again in {wait_s:.2g} s", retry_after_s=wait_s)
        self.left, self.counted_at = left - 1, now


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
        """Note a call of the worker."""
        self.called, self.hung_up = now, False
        if self.challenge is not None:
            self.challenge.set()


@dataclass
class Worker:
    """A registered worker; `last_seen` is the aggregator's clock, seconds; `polls` counts its open polls.

    `open_polls` are the time limits of its open polls, oldest first. `trust` says whether rounds may count on it.
    `left`: it said that it ends, and has not been heard of since. `delivered`: some run has accepted an update of
    it. `holder` is the process that speaks for it. `conditions` are how the device is, as its last poll said.
    """

    registration: RegisterRequest
    last_seen: float
    polls: int = 0
    left: bool = False
    delivered: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    holder: Holder = field(default_factory=Holder)
    open_polls: list[asyncio.Timeout] = field(default_factory=list)
    trust: Punctuality = _TRUSTED
    changes: Allowance | None = None
    conditions: DeviceConditions = field(default_factory=DeviceConditions)
    name: str = field(init=False)
    evaluator: bool = field(init=False)

    def __post_init__(self) -> None:
        self.renew(self.registration)

    def renew(self, registration: RegisterRequest) -> None:
        """Take its new registration. What is asked of the whole fleet again and again is read once, here."""
        self.registration = registration
        self.name = registration.worker
        self.evaluator = registration.role == WORKER_ROLE_EVALUATOR

    def heard(self, now: float) -> None:
        """Note a call of the worker."""
        self.last_seen, self.left = now, False

    @property
    def memory_bytes(self) -> int:
        """Memory of its device as it claims; 0 is unknown."""
        return int(self.registration.device.memory_bytes)

    @property
    def leads(self) -> bool:
        """True if it is an aggregator with workers of its own."""
        return self.registration.role == WORKER_ROLE_AGGREGATOR


class WorkerRegistry(Fleet[Worker]):
    """The fleet of this aggregator: its registrations, and its open polls. All runs of a process share it."""

    def __init__(self, max_workers: int, away_after_s: float) -> None:
        super().__init__(max_workers, away_after_s)
        self._wakeups = PacedWakeups()

    def knows(self, registration: RegisterRequest, session: Session | None = None) -> bool:
        """Return whether this very registration, by this process, is in force."""
        worker = self._workers.get(registration.worker)
        return worker is not None and worker.registration == registration and worker.holder.session == session

    def check(self, registration: RegisterRequest) -> None:
        """Raise `UsageError` where `register` will."""
        name = registration.worker
        if not _NAME.fullmatch(name):
            raise UsageError(f"a worker's name is 1 to 64 of letters, digits, '.', '_' and '-', not {name[:80]!r}")
        if (size_bytes := registration.ByteSize()) > _MAX_REGISTRATION_BYTES:
            raise UsageError(f"a registration of {size_bytes} bytes; allowed are {_MAX_REGISTRATION_BYTES}")

    def register(self, registration: RegisterRequest, now: float) -> Worker:
        """Add a worker, or renew its registration. Raises `UsageError` and `Exhausted`."""
        self.check(registration)
        if registration.worker not in self._workers and len(self._workers) >= self._max_workers:
            raise Exhausted(f"the limit of {self._max_workers} workers is reached")
        worker = self._workers.setdefault(registration.worker, Worker(registration, now))
        worker.renew(registration)
        worker.heard(now)
        return worker

    def restore(self, registration: RegisterRequest, now: float, session: Session | None = None) -> None:
        """Add a worker known from before a restart; it counts as away until it calls.

        Its name stays its own for as long as that of one that has just called: it may be about to.
        """
        last_seen = now - 2 * self._away_after_s
        holder = Holder(session, called=now, hung_up=True)
        self._workers[registration.worker] = Worker(registration, last_seen, holder=holder)

    def holds_name(self, worker: Worker, now: float) -> bool:
        """Return whether no other device may take the worker's name."""
        lately = now - worker.holder.called < self._away_after_s
        return self.alive(worker, now) or (lately and not worker.left)

    @contextmanager
    def polling(self, worker: Worker, limit: asyncio.Timeout | None = None) -> Iterator[None]:
        """Count a poll of the worker while the block runs. Of too many polls, the oldest reach their `limit`."""
        worker.polls += 1
        if limit is not None:
            worker.open_polls.append(limit)
        while len(worker.open_polls) > _MAX_POLLS:
            worker.open_polls.pop(0).reschedule(asyncio.get_running_loop().time())
        try:
            yield
        finally:
            worker.polls -= 1
            if limit is not None and limit in worker.open_polls:
                worker.open_polls.remove(limit)

    def wake(self, name: str) -> None:
        """Let the open polls of a worker look again, soon: of a crowd, a few at a time."""
        self._wakeups.wake(self.get(name).woken)

    def wake_evaluators_and(self, names: Container[str]) -> None:
        """Let the open polls of evaluators and of these workers look again."""
        for worker in self:
            if worker.evaluator or worker.name in names:
                worker.woken.set()

    def wake_all(self) -> None:
        """Let every open poll look again."""
        for worker in self:
            worker.woken.set()


class PacedWakeups:
    """Wakes the open polls of many workers in their order, a few at a time. Lives on one event loop.

    A thousand polls answered in one go are followed by a thousand downloads, and any other call meanwhile waits
    for all of them. So the next few are woken when the event loop has caught up with those before.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Event] = deque()
        self._next: asyncio.TimerHandle | None = None

    def wake(self, event: asyncio.Event) -> None:
        """Set the event soon: at once when it is one of a few."""
        if self._next is None:
            self._schedule(0.0)
        self._waiting.append(event)

    def _schedule(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(pause_s, self._step, loop.time() + pause_s)

    def _step(self, due: float) -> None:
        """Set the next few, and rest the longer the later the loop is."""
        for _ in range(min(len(self._waiting), max(_AT_ONCE, len(self._waiting) // _STEPS))):
            self._waiting.popleft().set()
        late_s = asyncio.get_running_loop().time() - due
        self._next = None
        if self._waiting:
            self._schedule(min(max(_PAUSE_S, _REST * late_s), _LONGEST_PAUSE_S))

"""Registrations of workers: one list for all runs of a process, on the disk before a worker counts as known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.registry import Allowance, WorkerRegistry
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.rpc.identity import Session
from fedgrpc.storage.run_store import RunStore
from fedgrpc.v1.aggregator_pb2 import RegisterRequest

# After each new name is stored, this many times as long for what rounds store: a sync of the disk each.
_REST: Final = 3.0
# A disk that stalled once keeps no new device waiting.
_LONGEST_REST_S: Final = 0.05

log = structlog.get_logger()


class Registering:
    """Takes registrations into a fleet, and into the database `store`. Lives on one event loop."""

    def __init__(
        self,
        fleet: WorkerRegistry,
        sessions: Sessions,
        store: RunStore,
        in_database: Callable[..., Awaitable[Any]],
        clock: Callable[[], float],
        runs: Callable[[], Iterable[Coordinator]],
    ) -> None:
        """`runs` are those of the fleet: their workers are not forgotten."""
        self._fleet = fleet
        self._sessions = sessions
        self._store = store
        self._in_database = in_database
        self._clock = clock
        self._runs = runs
        self._one = asyncio.Lock()
        self._rests_until = 0.0

    async def register(self, registration: RegisterRequest, session: Session, peer: str) -> bool:
        """Add or renew a worker, durably; whether another device had its name.

        Raises `Exhausted`, `NameTaken` and `StorageError`.
        """
        await self._sessions.claim(registration.worker, session, peer)
        if not self._fleet.knows(registration, session):
            # After an outage a whole fleet comes back at once with nothing new to store. Registrations are stored
            # one at a time, so that what a round stores waits for one of them at most.
            async with self._one:
                await self._rest()
                began = time.monotonic()
                await self._save(registration, session)
                now = time.monotonic()
                self._rests_until = now + min(_LONGEST_REST_S, _REST * (now - began))
                # Another process may have been faster.
                await self._sessions.claim(registration.worker, session, peer)
                worker = self._fleet.register(registration, self._clock())
            log.info("worker registered", worker=worker.name, device=registration.device.device_class)
        else:
            worker = self._fleet.register(registration, self._clock())
        return self._sessions.take(worker, session, peer)

    async def _rest(self) -> None:
        """Wait until a crowd of new names has left the disk to the rounds for a while."""
        await asyncio.sleep(max(0.0, self._rests_until - time.monotonic()))

    async def _save(self, registration: RegisterRequest, session: Session) -> None:
        """Store a registration, and make room for it where there is none. Raises `Exhausted`."""
        if (known := self._fleet.find(registration.worker)) is not None:
            known.changes = known.changes or Allowance()
            known.changes.take(self._clock())
        else:
            keep = {name for run in self._runs() for name in _needed(run)}
            forgotten = self._fleet.make_room(registration.worker, keep, self._clock())
            if forgotten:
                for run in self._runs():
                    run.workers.forget(forgotten)
                    if run.store is not self._store:
                        await run.in_database(run.store.forget_workers, forgotten)
                log.warning("workers forgotten", count=len(forgotten), reason="they never delivered an update")
                await self._in_database(self._store.forget_workers, forgotten)
        await self._in_database(self._store.save_worker, registration, str(session))


def _needed(run: Coordinator) -> set[str]:
    """Return the names of the workers of the round in progress, and of those that hold a task."""
    machine = run.machine
    at_work = () if machine.round is None else machine.round.state.workers
    return {*at_work, *machine.leases}

"""Shell of one run: its machine, and those who hear of its changes.

The rule: everything that the run knows is in its `RunMachine`, which only `apply` and `apply_after` change. Events
are applied at once, on the event loop, by whoever brings them. What others hear of is stored first: a task before
it is offered, an update before it is accepted, a version before it is known.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aio import Changes
from fedgrpc.errors import UnknownTask
from fedgrpc.privacy.secure_round import Ask, TellRoster
from fedgrpc.rounds.events import (
    Cancel,
    CarryOver,
    Commit,
    Failed,
    Finished,
    Offer,
    Rejected,
    Select,
    TaskPhase,
)
from fedgrpc.runs.events import Drop, Effect, EvaluatorPolled, Event, TaskClosed, UpdateAccepted, WorkerPolled
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.round_in_progress import check_ended_task
from fedgrpc.storage.run_store import RunStore

log = structlog.get_logger()
T = TypeVar("T")
# After these the driver looks whether the round has something to do.
_FINAL = (UpdateAccepted, Rejected, Failed)
# A worker that only asks changes nothing that watchers see.
_QUIET = (WorkerPolled, EvaluatorPolled)


class RunShell:
    """One run's machine, its database, and its effects. Lives on one event loop.

    `effects` are for the driver to carry out, in this order. `wake` is set when it may have something to do, and
    `changes` when watchers have something to see.
    """

    def __init__(
        self, machine: RunMachine, fleet: WorkerRegistry, store: RunStore, name: str, clock: Callable[[], float]
    ) -> None:
        self.machine = machine
        self.fleet = fleet
        self.store = store
        self.clock = clock
        self.effects: deque[Select | Commit | Finished | Drop | TellRoster | Ask] = deque()
        self.wake = asyncio.Event()
        self.changes = Changes()
        self._task_closed: list[Callable[[str, str], None]] = []
        # One thread: SQLite has one writer, and what is stored keeps the order of the calls.
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._log = log.bind(run=name)

    async def in_database(self, call: Callable[..., T], *args: object) -> T:
        """Run a method of `store` in its thread. Raises as it does."""
        return await asyncio.get_running_loop().run_in_executor(self._database, call, *args)

    def close(self) -> None:
        """Let the database go."""
        self._database.shutdown()
        self.store.close()

    def apply(self, event: Event) -> None:
        """Apply one event to the run. Raises as `RunMachine.apply`; nothing has then happened."""
        effects = self.machine.apply(event, self.clock())
        for effect in effects:
            self._carry_out(effect)
        if effects or isinstance(event, _FINAL):
            self.wake.set()
        if effects or not isinstance(event, _QUIET):
            self.changes.notify()

    async def apply_after(self, event: Event, store: Callable[[RunMachine], Awaitable[None]]) -> None:
        """Store the run as the event will leave it, and then apply the event. Raises as `apply`, and as `store`.

        Nothing is waited for in between, or a second try would store it twice.
        """
        await store(self.machine.foresee(event, self.clock()))
        # Events that came meanwhile may forbid it: then it raises, and a restart finds what was stored.
        self.apply(event)

    def on_task_closed(self, call: Callable[[str, str], None]) -> None:
        """Call `call(token, reason)` whenever no update of a task is wanted any more."""
        self._task_closed.append(call)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            # The driver needs time for its effects: it gets them in order, and everybody else at once.
            case Offer(worker=name):
                self.fleet.wake(name)
            case TaskClosed(token, reason):
                for call in self._task_closed:
                    call(token, reason)
            case Cancel(token):
                self._log_task("task lost", token)
            case CarryOver(token):
                self._log_task("task carried over", token)
            case Select() | Commit() | Finished() | Drop() | TellRoster() | Ask():
                self.effects.append(effect)

    def _log_task(self, event: str, token: str) -> None:
        state = self.machine.current.state
        task = state.tasks[token]
        self._log.info(event, round=state.number, worker=task.worker, reason=task.reason)

    async def check_open(self, name: str, token: str) -> TaskPhase:
        """Return the phase of a task that may still send or has sent its update.

        Raises `UnknownTask`, `WrongIdentity`, and `RoundClosed` when its update is not wanted any more. A task
        whose update was accepted stays accepted after its round: sending twice counts once.
        """
        round_ = self.machine.round
        if round_ is not None and token in round_:
            return round_.check_task(name, token)
        row = await self.in_database(self.store.task, token)
        if row is None:
            raise UnknownTask("no task has this token")
        return check_ended_task(name, row.worker, row.phase, row.reason)

    def reject(self, token: str, reason: str) -> None:
        """Record that an update was refused, for good."""
        round_, reason = self.machine.round_of(token), claims.REASON.cleaned(reason)
        self._log.warning("update refused", round=round_.number, worker=round_.worker_of(token), reason=reason)
        self.apply(Rejected(token, reason))

    def news(self) -> None:
        """Let the driver and all watchers look."""
        self.wake.set()
        self.changes.notify()

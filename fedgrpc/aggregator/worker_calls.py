"""Calls of workers: registering, asking for a task, heartbeats, and giving a task back.

The rule: a registration is stored before it counts. A poll waits for a task, and every call shows that its worker
is alive. Models and updates have modules of their own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, replace

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.registry import Allowance, Worker
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.errors import RoundClosed, UnknownWorker, UsageError, WrongIdentity
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.rounds.events import Failed, Progress, TaskPhase
from fedgrpc.rounds.round import time_left
from fedgrpc.rpc.identity import Session
from fedgrpc.runs.events import DeviceReplaced, Evaluated, EvaluatorPolled, WorkerPolled, WorkerTold
from fedgrpc.v1.aggregator_pb2 import RegisterRequest

log = structlog.get_logger()
_ANONYMOUS = Session()
# After each new name is stored, this many times as long for what rounds store: a sync of the disk each.
_REGISTERING_REST = 3.0
# A disk that stalled once keeps no new device waiting.
_LONGEST_REST_S = 0.05


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat: whether to stop, why, and the time left; None: no deadline."""

    cancel: bool
    reason: str = ""
    time_left_s: float | None = None


class WorkerCalls:
    """Calls of the workers of one run, but for pulling models and pushing updates."""

    def __init__(self, coordinator: Coordinator, sessions: Sessions) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = coordinator.settings
        self._fleet = coordinator.fleet
        self._sessions = sessions
        self._workers = coordinator.workers
        self._negotiation = coordinator.negotiation
        self._store = coordinator.store
        self._local_models = coordinator.local_models
        self._first_model = coordinator.first_model
        self._registering = asyncio.Lock()
        self._registering_rests_until = 0.0
        self._log = log.bind(run=coordinator.settings.run_name)

    async def register(self, registration: RegisterRequest, session: Session = _ANONYMOUS, peer: str = "") -> None:
        """Add or renew a worker, durably. Raises `UsageError`, `WrongIdentity`, `Exhausted` and `NameTaken`."""
        self._fleet.check(registration)
        registration = bounded_registration(registration)
        self._settings.roles.check(registration)
        self._negotiation.check(registration)
        await self._sessions.claim(registration.worker, session, peer)
        if not self._fleet.knows(registration, session):
            # After an outage a whole fleet comes back at once with nothing new to store. Registrations are stored
            # one at a time, so that what a round stores waits for one of them at most.
            async with self._registering:
                await self._rest_from_registering()
                began = time.monotonic()
                await self._save_worker(registration, session)
                now = time.monotonic()
                self._registering_rests_until = now + min(_LONGEST_REST_S, _REGISTERING_REST * (now - began))
                # Another process may have been faster.
                await self._sessions.claim(registration.worker, session, peer)
                worker = self._fleet.register(registration, self._coordinator.clock())
            self._log.info("worker registered", worker=worker.name, device=registration.device.device_class)
        else:
            worker = self._fleet.register(registration, self._coordinator.clock())
        if self._sessions.take(worker, session, peer):
            self._coordinator.apply(DeviceReplaced(worker.name))
        self._coordinator.wake.set()

    async def _rest_from_registering(self) -> None:
        """Wait until a crowd of new names has left the disk to the rounds for a while."""
        await asyncio.sleep(max(0.0, self._registering_rests_until - time.monotonic()))

    async def _save_worker(self, registration: RegisterRequest, session: Session) -> None:
        """Store a registration, and make room for it where there is none. Raises `Exhausted`."""
        if (known := self._fleet.find(registration.worker)) is not None:
            known.changes = known.changes or Allowance()
            known.changes.take(self._coordinator.clock())
        else:
            run = self._run
            at_work = () if run.round is None else run.round.state.workers
            keep = {*at_work, *run.leases}
            forgotten = self._fleet.make_room(registration.worker, keep, self._coordinator.clock())
            if forgotten:
                self._workers.forget(forgotten)
                self._log.warning(
                    "workers forgotten", count=len(forgotten), reason="they never delivered an update"
                )
                await self._coordinator.in_database(self._store.forget_workers, forgotten)
        await self._coordinator.in_database(self._store.save_worker, registration, str(session))

    @property
    def asks_channels(self) -> bool:
        """True if workers that register are to send the channels of the model."""
        # The plans of a leaf come with its parent's tasks, when it is too late to ask.
        leads_for_a_parent = not self._run.makes_versions and self._local_models.channels is None
        return self._local_models.wants_channels or leads_for_a_parent

    async def describe(self, name: str, description: ModelDescription) -> None:
        """Keep what a worker says of the model. Raises `UnknownWorker` and `StorageError`."""
        worker = self._fleet.get(name)
        worker.heard(self._coordinator.clock())
        self._workers.describe(name, replace(description, channels=None, killed=None))
        if description.killed is not None:
            self._local_models.was_killed(name, description.killed, self._run.layout)
        if description.channels is not None:
            await asyncio.to_thread(self._local_models.learn, description.channels, self._run.layout)
        if not self._run.began:
            self._first_model.tell_lacking()
        self._coordinator.wake.set()

    async def poll(
        self,
        name: str,
        wait_s: float,
        held: tuple[int, bytes] | None = None,
        new_examples: int | None = None,
    ) -> str | None:
        """Return the token of a worker's task, as soon as there is one. None after `wait_s`, and after the run.

        Raises `UnknownWorker`, also for one that registered when this run had other encodings or named others.
        """
        worker = self._fleet.get(name)
        try:
            self._negotiation.check(worker.registration)
            self._settings.roles.check(worker.registration)
        except (UsageError, WrongIdentity) as error:
            raise UnknownWorker(f"register again: {error}") from error
        worker.heard(self._coordinator.clock())
        self._coordinator.apply(WorkerPolled(name, held, new_examples))
        limit = asyncio.timeout(min(wait_s, self._settings.poll_wait_s))
        with self._fleet.polling(worker, limit):
            self._coordinator.wake.set()
            try:
                async with limit:
                    # A poll that is challenged ends, for the caller to show that it is alive.
                    while not (self._run.ended or self._coordinator.stopping or worker.holder.challenge):
                        worker.woken.clear()
                        if token := self._token_for(worker):
                            return token
                        await worker.woken.wait()
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                worker.holder.hung_up = worker.polls == 1
                raise
            finally:
                worker.last_seen = self._coordinator.clock()
        self._coordinator.apply(WorkerTold(name))
        return None

    def _token_for(self, worker: Worker) -> str | None:
        """Return the task of a worker that polls. An expired task is its own again."""
        run = self._run
        if worker.evaluator:
            self._coordinator.apply(EvaluatorPolled(worker.name, secrets.token_urlsafe(18)))
            evaluation = run.evaluation_of(worker.name)
            return None if evaluation is None else evaluation.token
        token = run.task_of(worker.name)
        if token is not None:
            phase = run.current.state.find(token).phase
            self._coordinator.apply(Progress(token, TaskPhase.OFFERED if phase is TaskPhase.EXPIRED else phase))
        return token

    async def heartbeat(self, name: str, token: str, phase: TaskPhase, fraction: float) -> Beat:
        """Extend a lease. Raises `UnknownTask` and `WrongIdentity`."""
        self._fleet.get(name).heard(self._coordinator.clock())
        run = self._run
        if run.evaluations.find(name, token):
            return Beat(cancel=False)
        try:
            if await self._coordinator.check_open(name, token) is TaskPhase.ACCEPTED:
                # Its acknowledgement may be on the way: a worker told to stop would drop an update that counts.
                return Beat(cancel=False)
            self._coordinator.apply(Progress(token, phase, fraction))
        except RoundClosed as error:
            return Beat(cancel=True, reason=str(error))
        stale = run.current.is_stale(token)
        return Beat(
            cancel=False, time_left_s=None if stale else time_left(run.current.state, self._coordinator.clock())
        )

    async def give_back(self, name: str, token: str, reason: str) -> None:
        """Take a task back from a worker. Idempotent. Raises `UnknownTask` and `WrongIdentity`."""
        reason = claims.REASON.cleaned(reason)
        if evaluation := self._run.evaluations.find(name, token):
            self._coordinator.apply(Evaluated(evaluation, None))
            self._coordinator.news()
        else:
            try:
                if await self._coordinator.check_open(name, token) is TaskPhase.ACCEPTED:
                    return
                self._coordinator.apply(Failed(token, reason))
            except RoundClosed:
                return
        # Only once it is known to be this worker's: a stranger would fill the log.
        self._log.warning("task given back", worker=name, reason=reason)

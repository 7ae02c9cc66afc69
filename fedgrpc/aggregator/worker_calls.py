"""Calls of workers: registering, asking for a task, heartbeats, and giving a task back.

The rule: a registration is stored before it counts. A poll waits for a task, and every call shows that its worker
is alive. Models and updates have modules of their own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.polls import polled
from fedgrpc.aggregator.registering import Registering
from fedgrpc.aggregator.registry import Worker
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.tokens import new_token
from fedgrpc.errors import RoundClosed, UnknownWorker, UsageError, WrongIdentity
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.rounds.events import Failed, Progress, TaskPhase
from fedgrpc.rounds.round import time_left
from fedgrpc.rpc.identity import Session
from fedgrpc.runs.events import DeviceReplaced, Evaluated, EvaluatorPolled, WorkerPolled, WorkerTold
from fedgrpc.v1.aggregator_pb2 import RegisterRequest

log = structlog.get_logger()
_ANONYMOUS = Session()


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat: whether to stop, why, and the time left; None: no deadline."""

    cancel: bool
    reason: str = ""
    time_left_s: float | None = None


class WorkerCalls:
    """Calls of the workers of one run, but for pulling models and pushing updates."""

    def __init__(
        self, coordinator: Coordinator, sessions: Sessions, registering: Registering | None = None
    ) -> None:
        """`registering` is that of the process; None: of this run alone."""
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
        self.registering = registering or Registering(
            self._fleet, sessions, self._store, coordinator.in_database, coordinator.clock, lambda: [coordinator]
        )
        self._log = log.bind(run=coordinator.settings.run_name)

    async def register(self, registration: RegisterRequest, session: Session = _ANONYMOUS, peer: str = "") -> bool:
        """Add or renew a worker, durably; whether another device had its name.

        Raises `UsageError`, `WrongIdentity`, `Exhausted` and `NameTaken`.
        """
        self._fleet.check(registration)
        registration = bounded_registration(registration)
        self._settings.roles.check(registration)
        self._negotiation.check(registration)
        replaced = await self.registering.register(registration, session, peer)
        if replaced:
            self._coordinator.apply(DeviceReplaced(registration.worker))
        self._coordinator.wake.set()
        return replaced

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
        keys: PublicKeys | None = None,
    ) -> str | None:
        """The token of the worker's task, as soon as it has one; None after `wait_s`, and once the run has ended.

        Raises `UnknownWorker`, also for one that registered when this run had other encodings or named others.
        """
        worker = self._fleet.get(name)
        self.check_known(worker)
        worker.heard(self._coordinator.clock())
        self.hear_poll(name, held, new_examples, keys)
        found = await polled(
            self._fleet,
            worker,
            min(wait_s, self._settings.poll_wait_s),
            self._coordinator.clock,
            lambda: self.token_for(worker),
            lambda: self._run.ended or self._coordinator.stopping,
            self._coordinator.wake.set,
        )
        if found is None:
            self.tell_end(name)
        return found

    def check_known(self, worker: Worker) -> None:
        """Raise `UnknownWorker` for one that registered when this run had other encodings or named others."""
        try:
            self._negotiation.check(worker.registration)
            self._settings.roles.check(worker.registration)
        except (UsageError, WrongIdentity) as error:
            raise UnknownWorker(f"register again: {error}") from error

    def hear_poll(
        self,
        name: str,
        held: tuple[int, bytes] | None,
        new_examples: int | None,
        keys: PublicKeys | None = None,
    ) -> None:
        """Note what a worker that polls has."""
        self._coordinator.apply(WorkerPolled(name, held, new_examples, keys))

    def tell_end(self, name: str) -> None:
        """Note that a worker has had its answer without a task: if the run has ended, it knows."""
        self._coordinator.apply(WorkerTold(name))

    def token_for(self, worker: Worker) -> str | None:
        """Return the task that a polling worker is to do, or to answer for. An expired one is its own again."""
        run = self._run
        if worker.evaluator:
            self._coordinator.apply(EvaluatorPolled(worker.name, new_token(run.id)))
            evaluation = run.evaluation_of(worker.name)
            return None if evaluation is None else evaluation.token
        if (asked := self._coordinator.secure_sums.question_for(worker.name)) is not None:
            return asked
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

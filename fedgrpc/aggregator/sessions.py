"""Processes that speak for workers: one at a time for each, so that no task token is given to two.

The rule: a name belongs to the device whose process holds it for as long as that one is alive. A new process of
the same device takes over at once, unless the former one answers: then the state folder has been copied. Whoever
speaks for a worker has the certificate, the role and the process that registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
import structlog

from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.aggregator.roles import check_still
from fedgrpc.errors import NameTaken, StateCopied
from fedgrpc.rpc.admission import caller
from fedgrpc.rpc.identity import Session

# A process that holds a task calls at each heartbeat, one whose poll is ended calls at once. The caller's own
# limit for the whole call is about twice as long as the longest wait.
_HEARTBEATS: Final = 1.5
_MOST_S: Final = 10.0

log = structlog.get_logger()


class Sessions:
    """The sessions of one fleet."""

    def __init__(self, fleet: WorkerRegistry, heartbeat_s: float, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._patience_s = min(_MOST_S, _HEARTBEATS * heartbeat_s)
        self._clock = clock

    def check(self, name: str, session: Session) -> None:
        """Note a call by the process that holds the name. Raises `NameTaken` for any other."""
        worker = self._fleet.find(name)
        if worker is None or worker.holder.session is None:
            return
        if worker.holder.session != session:
            raise _refusal(worker, session)
        worker.holder.heard(self._clock())

    async def claim(self, name: str, session: Session, peer: str) -> None:
        """Make sure that this process may hold the name; `take` it then at once.

        Raises:
            NameTaken: a device that is alive holds it, or, as `StateCopied`, another process with the same folder.
        """
        worker = self._fleet.find(name)
        if worker is None or worker.holder.session in (None, session):
            return
        same_folder = _same_folder(worker, session)
        if await self._answers(worker) if same_folder else self._fleet.holds_name(worker, self._clock()):
            self._log_refusal(worker, session, peer)
            raise _refusal(worker, session)

    def take(self, worker: Worker, session: Session, peer: str) -> bool:
        """Let this process speak for the worker; whether it belongs to another device than the one before."""
        holder = worker.holder
        other = holder.session is not None and not _same_folder(worker, session)
        if other:
            log.warning("name taken over", reason="the device that had it is gone", **self._about(worker, peer))
        if holder.session != session:
            holder.refused = None
        holder.session, holder.peer = session, peer
        holder.heard(self._clock())
        return other

    async def _answers(self, worker: Worker) -> bool:
        """Return whether the process that holds the name calls within the time in which a live one does."""
        holder = worker.holder
        if worker.left or holder.hung_up:
            return False
        silent_s = 0.0 if worker.polls else self._clock() - holder.called
        holder.challenge = holder.challenge or asyncio.Event()
        challenge = holder.challenge
        worker.woken.set()
        try:
            async with asyncio.timeout(max(0.0, self._patience_s - silent_s)):
                await challenge.wait()
        except TimeoutError:
            return False
        finally:
            if holder.challenge is challenge:
                holder.challenge = None
        return True

    def _log_refusal(self, worker: Worker, session: Session, peer: str) -> None:
        """Log one line for each process that is refused, however often it tries."""
        if worker.holder.refused != session:
            worker.holder.refused = session
            log.warning("name refused", reason=str(_refusal(worker, session)), **self._about(worker, peer))

    def _about(self, worker: Worker, peer: str) -> dict[str, Any]:
        silent_s = round(self._clock() - worker.holder.called, 1)
        return {"worker": worker.name, "peer": peer, "holder": worker.holder.peer, "holder_silent_s": silent_s}


def _same_folder(worker: Worker, session: Session) -> bool:
    return worker.holder.session is not None and worker.holder.session.folder == session.folder


def _refusal(worker: Worker, session: Session) -> NameTaken:
    if _same_folder(worker, session):
        return StateCopied(
            f"another process with the same state folder works as {worker.name!r}; if the folder was copied from "
            "another device, remove the copy and start again with another --name"
        )
    return NameTaken(f"another device works as {worker.name!r}; give each device a --name of its own")


def check_speaker(
    fleet: WorkerRegistry, sessions: Sessions, context: grpc.aio.ServicerContext, worker: str
) -> None:
    """Raise `WrongIdentity` or `NameTaken` when the caller is not the process that speaks for `worker`.

    Raises `UnknownWorker` for one that registered when it had another role.
    """
    caller().check_worker(worker)
    if (known := fleet.find(worker)) is not None:
        check_still(caller(), known.registration)
    sessions.check(worker, Session.of(context))

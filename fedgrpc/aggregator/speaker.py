"""Who may speak for a worker: its certificate, its role and its process have to be those that registered."""

from __future__ import annotations

import grpc.aio

from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.roles import check_still
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.rpc.admission import caller
from fedgrpc.rpc.identity import Session


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

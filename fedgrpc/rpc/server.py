"""A grpc.aio server in one `async with`: services, error statuses, health, reflection."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from fedgrpc.errors import UsageError
from fedgrpc.process import keep_from_children
from fedgrpc.rpc import framing
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.admission import Admission
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES, SERVER_OPTIONS, TLS_SERVER_OPTIONS, Options
from fedgrpc.rpc.ingest import Ingest, IngestProcesses
from fedgrpc.rpc.relayed_calls import Handlers, RelayedCalls
from fedgrpc.rpc.requests import FirstMessages
from fedgrpc.rpc.server_tls import ServerTls, server_credentials
from fedgrpc.rpc.status import ErrorInterceptor
from fedgrpc.v1 import aggregator_pb2_grpc, identity_pb2_grpc, models_pb2_grpc, worker_pb2_grpc

AGGREGATOR: Final = "fedgrpc.v1.Aggregator"
IDENTITY: Final = "fedgrpc.v1.Identity"
MODELS: Final = "fedgrpc.v1.Models"
WORKER: Final = "fedgrpc.v1.Worker"
_PROBE_S: Final = 1.0
_FREQUENT: Final = frozenset(
    f"/{AGGREGATOR}/{method}"
    for method in ("Register", "PollTask", "PollTasks", "PullModel", "Heartbeat", "PushUpdate")
)


@dataclass(frozen=True)
class Service:
    """A servicer, its full name, and the generated function that adds it to a server.

    `large` names the calls, as "/SERVICE/METHOD", that take requests of more than `SMALL_REQUEST_BYTES`.
    """

    name: str
    servicer: Any
    add: Callable[[Any, Any], None]
    large: frozenset[str] = frozenset()


def aggregator_service(
    servicer: aggregator_pb2_grpc.AggregatorServicer,
    max_header_bytes: Callable[[], int] = lambda: MAX_MESSAGE_BYTES,
) -> Service:
    """Return the `Aggregator` service of `servicer`. The header of an update has at most `max_header_bytes()`."""
    add = partial(framing.add_aggregator, max_header_bytes=max_header_bytes)
    return Service(AGGREGATOR, servicer, add, framing.LARGE_CALLS)


def identity_service(servicer: identity_pb2_grpc.IdentityServicer) -> Service:
    """Return the `Identity` service of `servicer`."""
    return Service(IDENTITY, servicer, identity_pb2_grpc.add_IdentityServicer_to_server)


def models_service(servicer: models_pb2_grpc.ModelsServicer) -> Service:
    """Return the `Models` service of `servicer`."""
    return Service(MODELS, servicer, framing.add_models)


def worker_service(servicer: worker_pb2_grpc.WorkerServicer) -> Service:
    """Return the `Worker` service of `servicer`."""
    return Service(WORKER, servicer, framing.add_worker)


class Health:
    """Health of services (grpc.health.v1): NOT_SERVING until set. The service "" serves if all others do."""

    def __init__(self, names: Sequence[str]) -> None:
        self._serving = dict.fromkeys(names, False)
        self.servicer = HealthServicer()

    async def set(self, name: str, serving: bool) -> None:
        """Set whether service `name` can do its work now.

        Raises:
            KeyError: no such service on this server.
        """
        if name not in self._serving:
            raise KeyError(name)
        self._serving[name] = serving
        await self._publish()

    async def set_all(self, serving: bool) -> None:
        """Set the health of every service at once."""
        self._serving = dict.fromkeys(self._serving, serving)
        await self._publish()

    async def _publish(self) -> None:
        statuses = {**self._serving, "": all(self._serving.values())}
        for name, serving in statuses.items():
            status = health_pb2.HealthCheckResponse
            await self.servicer.set(name, status.SERVING if serving else status.NOT_SERVING)


@dataclass(frozen=True)
class RunningServer:
    """A listening server: its address, its port (0 for a unix socket), its health and its ingest processes."""

    address: str
    port: int
    health: Health
    ingest: IngestProcesses | None = None


@asynccontextmanager
async def serve(
    address: str,
    services: Sequence[Service],
    *,
    tls: ServerTls | None = None,
    admission: Admission | None = None,
    local_address: str | None = None,
    grace_s: float = 5.0,
    options: Options | None = None,
    first_messages: FirstMessages | None = None,
    ingest: Ingest | None = None,
) -> AsyncIterator[RunningServer]:
    """Serve on `address` ("HOST:PORT"; port 0 takes a free one) until the block ends.

    `admission` decides who may call. `local_address` is a unix socket to serve on, too, for this user alone. With
    `ingest`, so many processes share the port and relay their calls (`fedgrpc.rpc.ingest`).

    Health starts as NOT_SERVING. The block sets it when its services are ready. When the block ends, the server
    refuses new calls, and those in flight have `grace_s` seconds to end. `options` win over `SERVER_OPTIONS`.

    Raises:
        UsageError: the address is malformed or not this machine's, the port is in use, a TLS file is bad.
    """
    where = Address.parse(address)
    large = frozenset().union(*(service.large for service in services))
    interceptor = ErrorInterceptor(large, first_messages, admission)
    # gRPC takes the first of options with the same name.
    options = [*(options or []), *([] if tls is None else TLS_SERVER_OPTIONS)]
    server = grpc.aio.server(interceptors=[interceptor], options=[*options, *SERVER_OPTIONS])
    health = Health([service.name for service in services])
    await health.set_all(False)
    handlers = Handlers()
    _add(services, health, handlers)
    handlers.serve_on(server, _FREQUENT)
    if local_address is not None:
        _listen(server, Address.parse(local_address), None)
    async with AsyncExitStack() as stack:
        processes = None
        if ingest is not None:
            if not where.is_unix:
                _check_free(where)
            processes = IngestProcesses(ingest, where, options, tls, partial(RelayedCalls, handlers, interceptor))
            port = await stack.enter_async_context(processes.opened(grace_s))
        else:
            port = _listen(server, where, tls)
        await server.start()
        try:
            yield RunningServer(str(where if where.is_unix else where.with_port(port)), port, health, processes)
        finally:
            await health.servicer.enter_graceful_shutdown()
            if processes is not None:
                processes.refuse_new_calls(grace_s)
            await server.stop(grace_s)


def _add(services: Sequence[Service], health: Health, server: Handlers) -> None:
    """Add the services, and what tells of them."""
    for service in services:
        service.add(service.servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = [service.name for service in services]
    names += [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), server)


def _listen(server: grpc.aio.Server, address: Address, tls: ServerTls | None) -> int:
    """Bind, and return the port, 0 for a unix socket."""
    credentials = None if tls is None else server_credentials(tls)
    if address.is_unix:
        _clear_path(address)
    else:
        _check_free(address)
    where = str(address)
    # Who may open a socket may call: the owner, from its first moment on, until they open it to others.
    umask = os.umask(0o077)
    try:
        port = (
            server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
        )
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {address}: {error}") from error
    finally:
        os.umask(umask)
    if address.is_unix:
        os.chmod(address.path, 0o600)
    keep_from_children(address.path or port)
    return 0 if address.is_unix else int(port)


def _clear_path(address: Address) -> None:
    """Remove the socket of a process that was killed. gRPC would also remove one that is in use."""
    path = Path(address.path)
    try:
        if not path.parent.is_dir():
            raise UsageError(f"cannot listen on {address}: there is no folder {path.parent}")
        if not path.exists():
            return
        if not path.is_socket():
            raise UsageError(f"cannot listen on {address}: the file is there already, and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_S)
            if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
                raise UsageError(f"cannot listen on {address}: the socket is in use; stop what uses it")
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from error


def _check_free(address: Address) -> None:
    """Raise `UsageError` with the reason why the address cannot be bound, which gRPC does not tell."""
    try:
        family, where = address.resolve(listening=True)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"cannot listen on {address}: the port is in use; stop what uses it or choose another port"
            ) from error
        raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from error

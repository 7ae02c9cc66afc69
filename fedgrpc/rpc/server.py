"""A grpc.aio server in one `async with`: services, the error interceptor, truthful health, reflection."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from fedgrpc.errors import UsageError
from fedgrpc.rpc import framing
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES, SERVER_OPTIONS, Options, Tls, check_target
from fedgrpc.rpc.requests import FirstMessages
from fedgrpc.rpc.status import ErrorInterceptor
from fedgrpc.v1 import aggregator_pb2_grpc, worker_pb2_grpc

AGGREGATOR: Final = "fedgrpc.v1.Aggregator"
WORKER: Final = "fedgrpc.v1.Worker"


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
    """The `Aggregator` service, served by `servicer`; an update's header has at most `max_header_bytes()`."""
    add = partial(framing.add_aggregator, max_header_bytes=max_header_bytes)
    return Service(AGGREGATOR, servicer, add, framing.CHUNK_CALLS)


def worker_service(servicer: worker_pb2_grpc.WorkerServicer) -> Service:
    """The `Worker` service, served by `servicer`."""
    return Service(WORKER, servicer, framing.add_worker)


class Health:
    """grpc.health.v1: each service NOT_SERVING until it is set; "" serves when all of them do."""

    def __init__(self, names: Sequence[str]) -> None:
        self._serving = dict.fromkeys(names, False)
        self.servicer = HealthServicer()

    async def set(self, name: str, serving: bool) -> None:
        """Say whether service `name` can do its work now.

        Raises:
            KeyError: no such service on this server.
        """
        if name not in self._serving:
            raise KeyError(name)
        self._serving[name] = serving
        await self._publish()

    async def set_all(self, serving: bool) -> None:
        """Say it of every service at once."""
        self._serving = dict.fromkeys(self._serving, serving)
        await self._publish()

    async def _publish(self) -> None:
        statuses = {**self._serving, "": all(self._serving.values())}
        for name, serving in statuses.items():
            status = health_pb2.HealthCheckResponse
            await self.servicer.set(name, status.SERVING if serving else status.NOT_SERVING)


@dataclass(frozen=True)
class RunningServer:
    """A server that listens: where, and how healthy it says it is."""

    address: str
    port: int
    health: Health


@asynccontextmanager
async def serve(
    address: str,
    services: Sequence[Service],
    *,
    tls: Tls | None = None,
    grace_s: float = 5.0,
    options: Options | None = None,
    first_messages: FirstMessages | None = None,
) -> AsyncIterator[RunningServer]:
    """Serve on `address` ("HOST:PORT"; port 0 takes a free one) until the block ends.

    Health starts as NOT_SERVING; the block says when its services are ready. On leaving, new calls are
    refused at once, and those in flight have `grace_s` seconds to end. `options` win over `SERVER_OPTIONS`.

    Raises:
        UsageError: the address is malformed or not this machine's, the port is in use, a TLS file is bad.
    """
    large = frozenset().union(*(service.large for service in services))
    # Of options with the same name gRPC takes the first.
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(large, first_messages)], options=[*(options or []), *SERVER_OPTIONS]
    )
    health = Health([service.name for service in services])
    await health.set_all(False)
    for service in services:
        service.add(service.servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = [service.name for service in services]
    reflection.enable_server_reflection(
        [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
    )
    port = _listen(server, address, tls)
    await server.start()
    try:
        yield RunningServer(f"{address.rpartition(':')[0]}:{port}", port, health)
    finally:
        await health.servicer.enter_graceful_shutdown()
        await server.stop(grace_s)


def _listen(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    check_target(address)
    if not address.startswith("unix:"):
        _check_free(address)
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {address}: {error}") from error
    return int(port)


def _check_free(address: str) -> None:
    """gRPC says only that binding failed; the system says why."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"cannot listen on {address}: the port is in use; stop what uses it or choose another port"
            ) from error
        raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from error

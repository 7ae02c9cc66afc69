"""HTTP server of the page: one socket, bounded connections, and the certificate that a browser has shown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedgrpc.errors import UsageError
from fedgrpc.process import keep_from_children
from fedgrpc.rpc.address import Address
from fedgrpc.web.visitors import CERTIFICATE

_MAX_CONNECTIONS: Final = 200
_MAX_HEAD_BYTES: Final = 16 << 10
_BACKLOG: Final = 64
_KEEP_ALIVE_S: Final = 30
_GRACE_S: Final = 1


class _Connection(H11Protocol):  # type: ignore[misc]
    """Connection that tells requests which certificate its handshake has accepted."""

    app_state: dict[str, Any]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        handshake = transport.get_extra_info("ssl_object")
        if handshake is not None and (der := handshake.getpeercert(binary_form=True)):
            self.app_state = {**self.app_state, CERTIFICATE: der}


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Server beside others in one process: signals are for the process, and somebody waits until it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(address: Address, app: ASGIApp, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve `app` while the block runs; yields the port. Raises `UsageError` where the address cannot be used."""
    listener = _listener(address)
    port = int(listener.getsockname()[1])
    keep_from_children(port)
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        # What fails is logged where it fails.
        log_level="critical",
        access_log=False,
        # Whoever connects is whoever connects, whatever their headers say.
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        backlog=_BACKLOG,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    begun = asyncio.create_task(server.listens.wait())
    try:
        await asyncio.wait([serving, begun], return_when=asyncio.FIRST_COMPLETED)
        yield port
    finally:
        begun.cancel()
        server.should_exit = True
        await serving
        listener.close()


def _listener(address: Address) -> socket.socket:
    if address.is_unix:
        raise UsageError(f"the page is served at HOST:PORT, as in 127.0.0.1:8080, not on {address}")
    try:
        family, where = address.resolve(listening=True)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        raise UsageError(f"cannot serve the page on {address}: {error.strerror or error}") from error
    return listener

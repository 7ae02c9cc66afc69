"""An ingest process: it accepts connections at the aggregator's port and relays their calls to the run's process.

The rule: it keeps nothing. When it dies its callers dial again, and another one or its successor takes them. When
the run's process dies it ends at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog

from fedgrpc.aio import until_done
from fedgrpc.errors import Exhausted, FedgrpcError, LinkError
from fedgrpc.process import collect_rarely, die_with_parent, reuse_memory
from fedgrpc.rpc.channel import SERVER_OPTIONS
from fedgrpc.rpc.relay import OF_PROCESS, Kind, Link, fields_of, joined
from fedgrpc.rpc.relayed_calls import CallDetails, metadata_of
from fedgrpc.rpc.server_stream import abort, send
from fedgrpc.rpc.server_tls import TlsMaterial, reloading_credentials

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_SHARED_PORT: Final = ("grpc.so_reuseport", 1)
_MOST_NUMBERS: Final = 1 << 32
_TLS_WITHIN_S: Final = 5.0

log = structlog.get_logger()


class Caller(Protocol):
    """The caller of a call, as work with its messages sees it."""

    async def read(self) -> bytes | None:
        """Return the next message; None behind the last."""

    async def write(self, message: bytes) -> None:
        """Send a message, and wait until the connection has taken it."""

    def tell(self, number: int) -> None:
        """Tell the run's process how far the work is."""


# Does what the run's process asks, with the messages of a call; returns the result. Raises domain errors.
Work = Callable[[bytes, Caller], Awaitable[bytes]]


class _Call:
    """One call of a caller, as the run's process wants it relayed."""

    def __init__(self, link: Link, number: int, method: str, context: Any, work: Work) -> None:
        self._work = work
        self.orders: asyncio.Queue[tuple[Kind, bytes]] = asyncio.Queue()
        self._link = link
        self._number = number
        self._method = method
        self._context = context
        self._ended = False

    async def relay(self) -> None:
        """Do as the run's process says until it ends the call."""
        reading: asyncio.Task[None] | None = None
        doing: asyncio.Task[None] | None = None
        self._link.send(Kind.BEGUN, self._number, _details_of(self._method, self._context).encoded())
        try:
            while True:
                kind, body = await self.orders.get()
                if kind is Kind.READ:
                    reading = asyncio.create_task(self._relay_next())
                elif kind is Kind.WRITE:
                    await self.write(body)
                    self._link.send(Kind.WRITTEN, self._number)
                elif kind is Kind.DO:
                    doing = asyncio.create_task(self._do(body))
                elif kind is Kind.STOP_DOING:
                    assert doing is not None
                    doing.cancel()
                else:
                    self._ended = True
                    await self._end(body)
                    return
        finally:
            if reading is not None:
                reading.cancel()
            if doing is not None:
                doing.cancel()
                await until_done(doing)
            if not self._ended:
                self._link.send(Kind.HUNG_UP, self._number)

    async def read(self) -> bytes | None:
        """See `Caller`."""
        message = await self._context.read()
        return None if message is grpc.aio.EOF else bytes(message)

    async def write(self, message: bytes) -> None:
        """See `Caller`."""
        await send(self._context, message)

    def tell(self, number: int) -> None:
        """See `Caller`."""
        self._link.send(Kind.PROGRESS, self._number, number.to_bytes(8, "little"))

    async def _relay_next(self) -> None:
        message = await self.read()
        self._link.send(Kind.LAST if message is None else Kind.MESSAGE, self._number, message or b"")

    async def _do(self, body: bytes) -> None:
        try:
            self._link.send(Kind.DONE, self._number, await self._work(body, self))
        except asyncio.CancelledError:
            self._failed(LinkError("the call has ended"))
        except FedgrpcError as error:
            self._failed(error)
        except Exception as error:
            # The last line of its task: unanswered, the call would wait for its end in vain.
            log.error("work failed", method=self._method, exc_info=error)
            self._failed(FedgrpcError("internal error; see the aggregator's log"))

    def _failed(self, error: FedgrpcError) -> None:
        after = (
            str(error.retry_after_s) if isinstance(error, Exhausted) and error.retry_after_s is not None else ""
        )
        self._link.send(Kind.FAILED, self._number, joined((type(error).__name__, str(error), after)))

    async def _end(self, body: bytes) -> None:
        code, text, *pairs = fields_of(body)
        status = _CODES[int(code)]
        if status is not grpc.StatusCode.OK:
            await abort(self._context, status, text.decode(), metadata_of(pairs))


def _details_of(method: str, context: Any) -> CallDetails:
    security = context.auth_context()
    over_tls = security.get("transport_security_type") == [b"ssl"]
    shown = security.get("x509_pem_cert")
    metadata = tuple((str(key), value) for key, value in context.invocation_metadata() or ())
    return CallDetails(method, str(context.peer()), over_tls, bytes(shown[0]) if shown else b"", metadata)


class IngestProcess(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The process, from its first frame to its end."""

    def __init__(self, work: Callable[[dict[str, Any]], Work]) -> None:
        """`work` makes what does the work, from what it is started with."""
        self._make_work = work
        self._numbers = count(1)
        self._calls: dict[int, _Call] = {}
        self._tls: TlsMaterial | None = None
        self._asking: deque[asyncio.Future[None]] = deque()
        self._server: grpc.aio.Server | None = None
        self._starting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._stopping: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._link = Link(self._on_frame, lambda: os._exit(0))

    async def run(self, sock: socket.socket) -> None:
        """Serve until the run's process says that it is enough."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self._link, sock=sock)
        start = await self._starting
        options = [_SHARED_PORT, *((name, value) for name, value in start["options"]), *SERVER_OPTIONS]
        self._work = self._make_work(start["work"])
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((self,))
        if self._tls is None:
            server.add_insecure_port(start["address"])
        else:
            server.add_secure_port(start["address"], self._credentials(self._tls.asks))
        await server.start()
        self._link.send(Kind.SERVING, OF_PROCESS)
        living = asyncio.create_task(self._tell_life(start["alive_every_s"]))
        await server.stop(await self._stopping)
        living.cancel()

    async def _tell_life(self, every_s: float) -> None:
        while True:
            self._link.send(Kind.ALIVE, OF_PROCESS)
            await asyncio.sleep(every_s)

    def _credentials(self, asks: bool) -> Any:
        loop = asyncio.get_running_loop()

        def configuration() -> Any:
            assert self._tls is not None
            return self._tls.configuration()

        def revision() -> object:
            # In a thread of gRPC's, before each handshake: a join token counts from the moment there is one.
            if threading.current_thread() is not threading.main_thread():
                asyncio.run_coroutine_threadsafe(self._ask_tls(), loop).result()
            return self._tls

        return reloading_credentials(configuration, revision, asks)

    async def _ask_tls(self) -> None:
        """Return once the run's process has told what has changed, or is too busy to."""
        self._asking.append(told := asyncio.get_running_loop().create_future())
        self._link.send(Kind.ASK_TLS, OF_PROCESS)
        await asyncio.wait([told], timeout=_TLS_WITHIN_S)

    def _on_tls(self, body: bytes) -> None:
        if body:
            self._tls = TlsMaterial.decoded(body)
        if self._asking:
            self._asking.popleft().set_result(None)

    def _on_frame(self, kind: Kind, number: int, body: bytes) -> None:
        if kind is Kind.TLS:
            self._on_tls(body)
        elif kind is Kind.START:
            self._starting.set_result(json.loads(body))
        elif kind is Kind.STOP:
            self._stopping.set_result(float(body))
        elif (call := self._calls.get(number)) is not None:
            call.orders.put_nowait((kind, body))

    def service(self, handler_call_details: Any) -> Any:
        """Return a handler that relays, whatever the method: on the wire every call is two streams."""
        method = handler_call_details.method

        async def relay(_: Any, context: Any) -> None:
            number = next(self._numbers) % _MOST_NUMBERS or next(self._numbers)
            self._calls[number] = call = _Call(self._link, number, method, context, self._work)
            try:
                await call.relay()
            finally:
                del self._calls[number]

        return grpc.stream_stream_rpc_method_handler(relay)


def be_ingest_process(work: Callable[[dict[str, Any]], Work]) -> None:
    """Be an ingest process at the socket whose descriptor is the first argument, until the run's process ends."""
    # A terminal and systemd signal all processes at once. This one ends when the run's process has drained.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    reuse_memory()
    collect_rarely()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(False)

    async def run() -> None:
        await IngestProcess(work).run(sock)

    asyncio.run(run())
    os._exit(0)

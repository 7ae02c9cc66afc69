"""Calls that ingest processes relay: served here as gRPC would serve them, with the same handlers and interceptor.

The rule: what a caller may do is decided here, from its certificate, as for any call. An ingest process knows no
run, no worker and no identity.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
import structlog

from fedgrpc.aio import until_done
from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.rpc.relay import OF_PROCESS, Kind, Link, fields_of, joined
from fedgrpc.rpc.status import ErrorInterceptor, error_of

_OK: Final = grpc.StatusCode.OK
_TLS: Final = b"ssl"

log = structlog.get_logger()

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class CallDetails:
    """Facts of a call before its first message; `certificate` is PEM, and `over_tls` tells how it came."""

    method: str
    peer: str
    over_tls: bool
    certificate: bytes
    metadata: Metadata

    def encoded(self) -> bytes:
        """Return it as the body of a frame."""
        pairs = (part for pair in self.metadata for part in pair)
        return joined((self.method, self.peer, b"1" if self.over_tls else b"", self.certificate, *pairs))

    @classmethod
    def decoded(cls, body: bytes) -> CallDetails:
        """Return what `encoded` made a body of."""
        method, peer, over_tls, certificate, *pairs = fields_of(body)
        return cls(method.decode(), peer.decode(), bool(over_tls), certificate, metadata_of(pairs))


def metadata_of(fields: list[bytes]) -> Metadata:
    """Return metadata of keys and values in turn: those of keys with -bin are bytes."""
    keys = [key.decode() for key in fields[::2]]
    values = zip(keys, fields[1::2], strict=True)
    return tuple((key, value if key.endswith("-bin") else value.decode()) for key, value in values)


class Handlers:
    """The handlers of a server, collected from generated code; a later one takes the place of an earlier.

    `grpc.aio` waits for calls of each registered method apart from all others, and with each call it goes through
    all of these waits. So only calls that come by the thousand are registered.
    """

    def __init__(self) -> None:
        self._of_service: dict[str, dict[str, Any]] = {}
        self._of_path: dict[str, Any] = {}
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add handlers that are asked for methods without a name here. Generated code adds all in both ways."""
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the handlers of a service, by the names of its methods."""
        self._of_service.setdefault(service, {}).update(handlers)
        self._of_path |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def serve_on(self, server: grpc.aio.Server, frequent: Collection[str]) -> None:
        """Let `server` have them all; `frequent` are paths of methods to register."""
        for service, handlers in self._of_service.items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
            often = {name: each for name, each in handlers.items() if f"/{service}/{name}" in frequent}
            server.add_registered_method_handlers(service, often)
        server.add_generic_rpc_handlers(tuple(self._generic))

    async def find(self, details: Any) -> Any:
        """Return the handler of a call; None without one."""
        # The whole path: callers choose it, and whoever finds a handler keeps it by that.
        if (registered := self._of_path.get(details.method)) is not None:
            return registered
        return next(filter(None, (each.service(details) for each in self._generic)), None)


class RelayedCall:
    """A call as its servicer sees it: what this package uses of `grpc.aio.ServicerContext`."""

    def __init__(self, link: Link, number: int, details: CallDetails) -> None:
        self.details = details
        self.deserialize: Callable[[bytes], Any] | None = None
        self.serialize: Callable[[Any], bytes] | None = None
        self._link = link
        self._number = number
        self._ended = False
        # A message that came while nobody waited, and whether one was asked for.
        self._arrived: list[bytes | None] = []
        self._asked = False
        self._at_end = False
        self._reading: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._doing: asyncio.Future[bytes] | None = None
        self._on_progress: Callable[[int], None] = lambda number: None
        self._refusal: FedgrpcError | None = None

    def peer(self) -> str:
        """See gRPC."""
        return self.details.peer

    def auth_context(self) -> dict[str, list[bytes]]:
        """See gRPC."""
        if not self.details.over_tls:
            return {}
        shown = [self.details.certificate] if self.details.certificate else []
        return {"transport_security_type": [_TLS], "x509_pem_cert": shown}

    def invocation_metadata(self) -> Metadata:
        """See gRPC."""
        return self.details.metadata

    def done(self) -> bool:
        """See gRPC."""
        return self._ended

    async def read(self) -> Any:
        """Return the next message; `grpc.aio.EOF` behind the last. Raises what the deserializer raises."""
        if self._at_end:
            return grpc.aio.EOF
        if not self._arrived:
            if not self._asked:
                self._asked = True
                self._link.send(Kind.READ, self._number)
            self._reading = asyncio.get_running_loop().create_future()
            await self._reading
        body = self._arrived.pop()
        if body is None:
            self._at_end = True
            return grpc.aio.EOF
        return body if self.deserialize is None else self.deserialize(body)

    async def write(self, message: Any) -> None:
        """Send a message, and wait until the caller's connection has taken it."""
        self._writing = asyncio.get_running_loop().create_future()
        self.send(message)
        await self._writing

    def send(self, message: Any) -> None:
        """Send a message, the last one before the end."""
        self._link.send(Kind.WRITE, self._number, message if self.serialize is None else self.serialize(message))

    async def do(self, work: bytes, on_progress: Callable[[int], None] = lambda number: None) -> bytes:
        """Have the ingest process do work with the rest of the call's messages; return its result.

        `on_progress` gets each number that it tells meanwhile. The work ends where that raises a domain error, and
        this raises the same. Cancelled, it returns or raises only once the work has ended. Raises the domain error
        that the work raised, and `LinkError` where its process has died.
        """
        self._on_progress = on_progress
        self._doing = asyncio.get_running_loop().create_future()
        if self._link.is_lost:
            self._doing.set_exception(_died())
        self._link.send(Kind.DO, self._number, work)
        try:
            return await asyncio.shield(self._doing)
        except asyncio.CancelledError:
            self._link.send(Kind.STOP_DOING, self._number)
            await until_done(self._doing)
            if self._doing.exception() is None:
                return self._doing.result()
            raise

    def on_work(self, kind: Kind, body: bytes) -> None:
        """Hear of work that the ingest process does."""
        if kind is Kind.PROGRESS:
            try:
                self._on_progress(int.from_bytes(body, "little"))
            except FedgrpcError as error:
                # It ends this work, and not the link with all its calls.
                self._refusal = error
                self._link.send(Kind.STOP_DOING, self._number)
        elif self._doing is not None and not self._doing.done():
            if kind is Kind.DONE:
                self._doing.set_result(body)
            elif self._refusal is not None:
                self._doing.set_exception(self._refusal)
            else:
                self._doing.set_exception(error_of(*(field.decode() for field in fields_of(body))))

    async def abort(self, code: Any, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with this status. Raises `grpc.aio.AbortError`."""
        self.end(code, details, trailing_metadata)
        raise grpc.aio.AbortError

    def end(self, code: Any, details: str = "", metadata: Metadata = ()) -> None:
        """End the call, unless it has ended."""
        if not self._ended:
            self._ended = True
            pairs = (part for pair in metadata for part in pair)
            self._link.send(Kind.END, self._number, joined((str(code.value[0]), details, *pairs)))

    def arrived(self, body: bytes | None) -> None:
        """Note the next message; None: there are no more."""
        self._asked = False
        self._arrived.append(body)
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)

    def written(self) -> None:
        """Note that the caller's connection has taken the last message."""
        if self._writing is not None and not self._writing.done():
            self._writing.set_result(None)

    def hung_up(self) -> None:
        """Note that the caller has gone."""
        self._ended = True

    def lost(self) -> None:
        """Note that the ingest process has died."""
        self.hung_up()
        if self._doing is not None and not self._doing.done():
            self._doing.set_exception(_died())


def _died() -> LinkError:
    return LinkError("the ingest process of this connection has died; try again")


class RelayedCalls:
    """The calls of one link, each a task. `on_process` gets the frames that are of no call."""

    def __init__(
        self, handlers: Handlers, interceptor: ErrorInterceptor, on_process: Callable[[Kind], None]
    ) -> None:
        self._handlers = handlers
        self._interceptor = interceptor
        self._on_process = on_process
        self._calls: dict[int, tuple[RelayedCall, asyncio.Task[None]]] = {}
        self.lost = asyncio.Event()
        self.link = Link(self._on_frame, self._on_lost)

    def __len__(self) -> int:
        return len(self._calls)

    def _on_frame(self, kind: Kind, number: int, body: bytes) -> None:
        if kind is Kind.BEGUN:
            call = RelayedCall(self.link, number, CallDetails.decoded(body))
            task = asyncio.create_task(self._serve(call, number))
            self._calls[number] = call, task
            return
        if number == OF_PROCESS:
            self._on_process(kind)
            return
        # A frame may cross with the end of its call.
        if (known := self._calls.get(number)) is None:
            return
        call, task = known
        if kind is Kind.MESSAGE:
            call.arrived(body)
        elif kind is Kind.LAST:
            call.arrived(None)
        elif kind is Kind.WRITTEN:
            call.written()
        elif kind is Kind.HUNG_UP:
            call.hung_up()
            task.cancel()
        else:
            call.on_work(kind, body)

    def _on_lost(self) -> None:
        self.lost.set()
        for call, task in list(self._calls.values()):
            call.lost()
            task.cancel()

    async def _serve(self, call: RelayedCall, number: int) -> None:
        try:
            await self._answer(call)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            # The caller has gone, or this process ends.
            call.end(grpc.StatusCode.CANCELLED, "the server ends the call")
        except Exception as error:
            # As in gRPC, the call ends and the process continues.
            log.error("call failed", method=call.details.method, exc_info=error)
            call.end(grpc.StatusCode.UNKNOWN, "internal error; see the server's log")
        finally:
            del self._calls[number]

    async def _answer(self, call: RelayedCall) -> None:
        handler = await self._interceptor.intercept_service(self._handlers.find, call.details)
        if handler is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
            return
        call.deserialize, call.serialize = handler.request_deserializer, handler.response_serializer
        made = (handler.stream_stream or handler.stream_unary)(None, call)
        if inspect.isasyncgen(made):
            async for response in made:
                await call.write(response)
                del response
        elif (answer := await made) is not None:
            call.send(answer)
        call.end(_OK)

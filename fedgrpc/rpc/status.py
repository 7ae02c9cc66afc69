"""Domain errors to gRPC statuses and back, in one place.

The class alone decides the status (the table is in `fedgrpc.errors`). The class name travels as trailing metadata,
so that the other side raises the same class. The status message is the error's own line. The time to wait before
another try travels as gRPC's own retries have it
(https://github.com/grpc/proposal/blob/master/A6-client-retries.md), which clients of other languages know.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message

from fedgrpc import errors
from fedgrpc.aio import until_done
from fedgrpc.claims import Text, printable
from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.identity.access import AUDITED
from fedgrpc.rpc.admission import Admission, note_request
from fedgrpc.rpc.requests import SMALL_REQUEST_BYTES, FirstMessages, bounded
from fedgrpc.rpc.server_stream import abort

ERROR_KEY: Final = "fedgrpc-error"
RETRY_KEY: Final = "grpc-retry-pushback-ms"
_DETAIL: Final = Text(1024)
MAX_RETRY_AFTER_S: Final = 3600.0
_MAX_DIGITS: Final = 18

_Code = grpc.StatusCode

# The nearest listed ancestor of a class decides.
_STATUS: Final[dict[type[FedgrpcError], Any]] = {
    errors.FedgrpcError: _Code.INTERNAL,
    errors.UsageError: _Code.INVALID_ARGUMENT,
    errors.CodecError: _Code.INVALID_ARGUMENT,
    errors.EncodeError: _Code.INTERNAL,
    errors.TooLargeError: _Code.RESOURCE_EXHAUSTED,
    errors.CorruptError: _Code.DATA_LOSS,
    errors.UpdateRefused: _Code.INVALID_ARGUMENT,
    errors.UnknownTask: _Code.NOT_FOUND,
    errors.UnknownWorker: _Code.NOT_FOUND,
    errors.NotFound: _Code.NOT_FOUND,
    errors.RoundClosed: _Code.FAILED_PRECONDITION,
    errors.IllegalTransition: _Code.FAILED_PRECONDITION,
    errors.WrongOffset: _Code.OUT_OF_RANGE,
    errors.Exhausted: _Code.RESOURCE_EXHAUSTED,
    errors.WrongIdentity: _Code.PERMISSION_DENIED,
    errors.NotApproved: _Code.PERMISSION_DENIED,
    errors.NotEnrolled: _Code.UNAUTHENTICATED,
    errors.TokenRefused: _Code.UNAUTHENTICATED,
    errors.NameTaken: _Code.ALREADY_EXISTS,
    errors.LinkError: _Code.UNAVAILABLE,
}

# For an answer without a class: from another implementation of the protocol, a proxy, or gRPC itself.
# The codes not listed (UNAVAILABLE, CANCELLED, DEADLINE_EXCEEDED, UNKNOWN, INTERNAL, UNIMPLEMENTED)
# come from broken links and ingresses without a backend.
_CLASS_OF_CODE: Final[dict[Any, type[FedgrpcError]]] = {
    _Code.INVALID_ARGUMENT: errors.LayoutError,
    _Code.NOT_FOUND: errors.NotFound,
    _Code.FAILED_PRECONDITION: errors.RoundClosed,
    _Code.OUT_OF_RANGE: errors.WrongOffset,
    _Code.DATA_LOSS: errors.CorruptError,
    _Code.RESOURCE_EXHAUSTED: errors.Exhausted,
    _Code.PERMISSION_DENIED: errors.WrongIdentity,
    _Code.ALREADY_EXISTS: errors.NameTaken,
    _Code.UNAUTHENTICATED: errors.NotEnrolled,
}

_CLASS_OF_NAME: Final[dict[str, type[FedgrpcError]]] = {
    name: item for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, FedgrpcError)
}

log = structlog.get_logger()


def status_of(error: FedgrpcError) -> Any:
    """Return the `grpc.StatusCode` of a domain error."""
    return next(_STATUS[item] for item in type(error).__mro__ if item in _STATUS)


def error_from(rpc_error: grpc.aio.AioRpcError) -> FedgrpcError:
    """Return the domain error of a failed call. `LinkError` if the peer itself gave no answer."""
    detail = printable(rpc_error.details() or rpc_error.code().name)
    name = _trailer(rpc_error, ERROR_KEY)
    code = rpc_error.code()
    if name is None and code is _Code.RESOURCE_EXHAUSTED and "larger than max" in detail:
        return errors.TooLargeError(detail)
    kind = _CLASS_OF_CODE.get(code) if name is None else _CLASS_OF_NAME.get(name, FedgrpcError)
    if kind is errors.Exhausted:
        return errors.Exhausted(detail, retry_after_s=_retry_after_s(rpc_error))
    return LinkError(f"{code.name}: {one_line(detail)}") if kind is None else kind(detail)


def error_of(name: str, text: str, retry_after: str = "") -> FedgrpcError:
    """Return the domain error of that class name, as another process of this aggregator has told it."""
    kind = _CLASS_OF_NAME.get(name, FedgrpcError)
    return errors.Exhausted(text, retry_after_s=float(retry_after)) if retry_after else kind(text)


def _trailer(rpc_error: grpc.aio.AioRpcError, name: str) -> str | None:
    for key, value in rpc_error.trailing_metadata() or ():
        if key == name:
            return str(value)
    return None


def _retry_after_s(rpc_error: grpc.aio.AioRpcError) -> float | None:
    """Return the wait that the peer asks for, bounded. None: it asks for none."""
    text = _trailer(rpc_error, RETRY_KEY) or ""
    known = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    return min(int(text) / 1e3, MAX_RETRY_AFTER_S) if known else None


@contextmanager
def domain_errors() -> Iterator[None]:
    """Raise the domain error of a client's call that fails within."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from(error) from error
    except grpc.aio.UsageError as error:
        # grpc.aio raises this for calls on a channel that was closed meanwhile.
        raise LinkError(str(error)) from error


def one_line(text: str) -> str:
    """Return `text` without line breaks and control characters, cut to the length of a status message."""
    return _DETAIL.cleaned(text)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Admits every call, bounds its requests, and turns what a servicer raises into a status.

    Domain errors become the status of `status_of`. Anything else becomes INTERNAL, with its traceback in the log
    and one generic line for the peer. `large` names the calls whose deserializers bound their messages themselves.

    Every call is served as one that streams its requests, which looks the same to its client. gRPC itself would
    read the message of any other call, however long that takes and however many callers hold theirs back.
    """

    def __init__(
        self,
        large: Collection[str] = (),
        first_messages: FirstMessages | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._large = frozenset(large)
        self._first_messages = first_messages or FirstMessages()
        self._admission = admission or Admission()
        # Handlers by method, each wrapped at the first call.
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the call's handler with its behaviour wrapped. A method has one handler, whoever calls."""
        handler, method = await continuation(details), details.method
        if handler is None:
            return None
        if method not in self._wrapped:
            self._wrapped[method] = self._wrap(handler, method)
        return self._wrapped[method]

    def _wrap(self, handler: Any, method: str) -> Any:
        stream = grpc.stream_stream_rpc_method_handler
        make = stream if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        behaviour = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
        admitted = partial(self._admission.admitted, method=method)
        deserialize, small = handler.request_deserializer, method not in self._large
        if small:
            deserialize = bounded(deserialize, SMALL_REQUEST_BYTES)
        read = partial(_only, self._first_messages)
        if handler.request_streaming:
            # A small request on an open call costs as much as a call. The large ones are chunks of an update.
            read = partial(_messages, self._first_messages, paced=small)
        return make(
            _guarded(behaviour, read, admitted, self._first_messages.pace, method),
            request_deserializer=deserialize,
            response_serializer=handler.response_serializer,
        )


async def _only(first: FirstMessages, context: Any) -> Any:
    """Return the request of a call that has one."""
    return await first.request(context)


async def _messages(first: FirstMessages, context: Any, paced: bool) -> AsyncIterator[Any]:
    """Return all requests of a call, once the first is there. `paced`: each counts as a call of its caller."""
    return _following(await first.read(context), context, first.pace if paced else None)


async def _following(
    message: Any, context: Any, pace: Callable[[Any], Awaitable[None]] | None
) -> AsyncIterator[Any]:
    while message is not grpc.aio.EOF:
        yield message
        # Else this frame would hold the message until the next one is there.
        del message
        message = await context.read()
        if pace is not None:
            await pace(context)


def _guarded(
    behaviour: Any,
    read: Callable[[Any], Awaitable[Any]],
    admitted: Callable[[Any], AbstractContextManager[None]],
    pace: Callable[[Any], Awaitable[None]],
    method: str,
) -> Any:
    """Wrap a behaviour in one of its kind: grpc.aio tells generators from coroutines by inspection.

    A call that is not admitted waits for its turn as any other does, for a refusal costs time as well.
    """
    if inspect.isasyncgenfunction(behaviour):

        async def stream(_: Any, context: Any) -> AsyncIterator[Any]:
            came_in = False
            try:
                with admitted(context):
                    came_in = True
                    async for response in behaviour(await read(context), context):
                        yield response
            except Exception as error:  # noqa: BLE001 - ends the call with a status
                if not came_in:
                    await pace(context)
                await _abort(error, method, context)

        return stream

    async def single(_: Any, context: Any) -> Any:
        came_in = False
        try:
            with admitted(context):
                came_in = True
                request = await read(context)
                if isinstance(request, Message):
                    note_request(request)
                made = behaviour(request, context)
                return await (_to_its_end(made) if method in AUDITED else made)
        except Exception as error:  # noqa: BLE001 - ends the call with a status
            if not came_in:
                await pace(context)
            await _abort(error, method, context)

    return single


async def _to_its_end(change: Coroutine[Any, Any, Any]) -> Any:
    """Return what a change returns, also when its caller hangs up: a change is made whole, and recorded."""
    task = asyncio.create_task(change)
    await until_done(task)
    return task.result()


def _let_go(error: BaseException | None) -> None:
    """Drop the frames of an error that became a status: they would hold requests until the next collection."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


async def _abort(error: Exception, method: str, context: Any) -> None:
    if context.done() and not isinstance(error, FedgrpcError):
        # The client has gone, and gRPC refuses to write to it. Links do that, so it is no error.
        log.debug("call broken off", method=method, reason=one_line(repr(error)))
        raise asyncio.CancelledError
    if isinstance(error, grpc.aio.BaseError) and not isinstance(error, grpc.aio.UsageError):
        # gRPC's own errors, as when the peer goes away during a `context.write`, are for gRPC to handle.
        raise error
    if isinstance(error, FedgrpcError):
        code, detail, name = status_of(error), one_line(str(error)), type(error).__name__
    else:
        log.error("call failed", method=method, exc_info=error)
        code, detail, name = _Code.INTERNAL, "internal error; see the server's log", FedgrpcError.__name__
    _let_go(error)
    trailers = [(ERROR_KEY, name)]
    if isinstance(error, errors.Exhausted) and error.retry_after_s is not None:
        trailers.append((RETRY_KEY, str(math.ceil(1e3 * error.retry_after_s))))
    await abort(context, code, detail, tuple(trailers))

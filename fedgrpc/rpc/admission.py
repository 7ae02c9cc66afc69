"""Admission of calls: who calls, whether that role may, and the end of calls whose caller may call no more.

The rule: nothing of a request is read before its caller is known and may make the call. Identity comes from the
connection, and never from a message. A caller over plaintext is local: such a listener is on this machine, or was
opened with --insecure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from fedgrpc.errors import FedgrpcError, NotEnrolled
from fedgrpc.identity.access import check_call
from fedgrpc.identity.roles import LOCAL, Identity

# The one call for which a certificate past its life will do.
_RENEW: Final = "/fedgrpc.v1.Identity/Renew"
_CALLER: ContextVar[Identity] = ContextVar("caller", default=LOCAL)

# Returns the identity of a certificate, PEM; the second argument: for its renewal. Raises `FedgrpcError`.
Identify = Callable[[bytes, bool], Identity]


def caller() -> Identity:
    """Return who makes the present call."""
    return _CALLER.get()


def quota_key(context: Any) -> str:
    """Return the name under which a call counts for limits: its caller's, or a local caller's connection."""
    return caller().name or str(context.peer())


def shown_certificate(context: Any) -> bytes:
    """Return the certificate, PEM, that the caller has shown. Raises `NotEnrolled`."""
    found = context.auth_context().get("x509_pem_cert")
    if not found:
        raise NotEnrolled("the caller shows no certificate")
    return bytes(found[0])


@dataclass(eq=False)
class _OpenCall:
    """A call in progress: its task, its certificate, and the error with which it has been ended."""

    certificate: bytes
    task: asyncio.Task[Any] | None
    error: FedgrpcError | None = None


class Admission:
    """Admits the calls of one server. Lives on one event loop. Without `identify` every caller is local."""

    def __init__(self, identify: Identify | None = None) -> None:
        self._identify = identify
        self._open: set[_OpenCall] = set()

    @contextmanager
    def admitted(self, context: Any, method: str) -> Iterator[None]:
        """Admit a call for as long as the block runs.

        Raises what `identify` raises, also when that changes meanwhile, and `WrongIdentity` where the caller's
        role may not make this call.
        """
        certificate = b""
        if self._identify is not None and _is_tls(context):
            certificate = shown_certificate(context)
            identity = self._identify(certificate, method == _RENEW)
            check_call(identity, method)
        else:
            identity = LOCAL
        _CALLER.set(identity)
        call = _OpenCall(certificate, asyncio.current_task())
        self._open.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.error is None or call.task is None:
                raise
            call.task.uncancel()
            raise call.error from None
        finally:
            self._open.discard(call)

    def end_stale_calls(self) -> None:
        """End the open calls of callers whose certificates have stopped to count since the calls began."""
        for call in list(self._open):
            if self._identify is None or not call.certificate or call.task is None or call.error is not None:
                continue
            try:
                self._identify(call.certificate, False)
            except FedgrpcError as error:
                # The call that puts its own caller out is to have its answer.
                if call.task is not asyncio.current_task():
                    call.error = error
                    call.task.cancel()


def _is_tls(context: Any) -> bool:
    return bool(context.auth_context().get("transport_security_type") == [b"ssl"])

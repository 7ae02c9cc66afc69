"""Admission of calls: who calls, whether that role may, a line of the audit log, and the end of stale calls.

The rule: nothing of a request is read before its caller is known and may make the call. Identity comes from the
connection, and never from a message. A caller over plaintext is local: such a listener is on this machine, or was
opened with --insecure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import structlog

from fedgrpc import tracing
from fedgrpc.errors import FedgrpcError, NotApproved, NotEnrolled, StorageError, WrongIdentity
from fedgrpc.identity.access import AUDITED, check_call
from fedgrpc.identity.audit import OK, AuditEntry, AuditLog
from fedgrpc.identity.roles import LOCAL, Identity, Role
from fedgrpc.rpc.behalf import Behalf
from fedgrpc.rpc.identity import peer_of

# The one call for which a certificate past its life will do.
_RENEW: Final = "/fedgrpc.v1.Identity/Renew"
_CALLER: ContextVar[Identity] = ContextVar("caller", default=LOCAL)
_FACTS: ContextVar[dict[str, str] | None] = ContextVar("facts", default=None)
# Before the caller is known.
_NOBODY: Final = Identity("", Role.JOINING)
# Errors about the caller rather than about what it asks.
_REFUSALS: Final = (WrongIdentity, NotEnrolled, NotApproved)

log = structlog.get_logger()

# Returns the identity of a certificate, PEM; the second argument: for its renewal. Raises `FedgrpcError`.
Identify = Callable[[bytes, bool], Identity]


def caller() -> Identity:
    """Return who makes the present call."""
    return _CALLER.get()


def note(**facts: str) -> None:
    """Add facts about the present call to its line of the audit log. Never a secret."""
    if (known := _FACTS.get()) is not None:
        known.update(facts)


def note_request(request: Any) -> None:
    """Add the texts, numbers and durations of the present call's request to its line of the audit log."""
    if _FACTS.get() is not None:
        note(
            **{
                each.name: _text(each, value)
                for each, value in request.ListFields()
                if each.type != each.TYPE_BYTES
            }
        )


def _text(field: Any, value: Any) -> str:
    if field.type == field.TYPE_ENUM and value in field.enum_type.values_by_number:
        return str(field.enum_type.values_by_number[value].name)
    return (
        ", ".join(" ".join(str(item).split()) for item in value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


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

    def __init__(
        self,
        identify: Identify | None = None,
        audit: AuditLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identify = identify
        self._audit = audit
        self._clock = clock
        self._open: set[_OpenCall] = set()

    @contextmanager
    def admitted(self, context: Any, method: str) -> Iterator[None]:
        """Admit a call for as long as the block runs, and record it where it changes something or is refused.

        Raises what `identify` raises, also when that changes meanwhile, and `WrongIdentity` where the caller's
        role may not make this call. `StorageError`: the call was made, and cannot be recorded.
        """
        facts: dict[str, str] | None = {} if method in AUDITED else None
        _FACTS.set(facts)
        # Before anything can be refused: a line of the log never names the caller of another call.
        _CALLER.set(_NOBODY)
        try:
            with tracing.served(context, method), self._admitted(context, method):
                yield
        except FedgrpcError as error:
            if facts is not None or isinstance(error, _REFUSALS):
                self._record_failure(context, method, facts or {}, error)
            raise
        except Exception:
            # A fault of this code. It may come after the change, so the log has the call all the same.
            if facts is not None and self._audit is not None:
                self._audit.record(self._entry(context, method, facts, "internal error"))
            raise
        # Behind the call, since the line says how it ended. Before its answer: no change is told unrecorded.
        if facts is not None and self._audit is not None:
            self._audit.record(self._entry(context, method, facts, OK))

    def _record_failure(self, context: Any, method: str, facts: dict[str, str], error: FedgrpcError) -> None:
        if self._audit is None:
            return
        entry = self._entry(context, method, facts, f"{type(error).__name__}: {error}")
        try:
            self._audit.refuse(entry)
        except StorageError as failed:
            # The caller's own error matters more to it.
            log.error("refusal not recorded", method=method, reason=str(failed))

    def _entry(self, context: Any, method: str, facts: dict[str, str], result: str) -> AuditEntry:
        who = "an unknown caller" if caller() is _NOBODY else str(caller())
        what = method.removeprefix("/").removeprefix("fedgrpc.v1.")
        behalf = Behalf.of(context)
        peer = peer_of(context) if behalf is None else f"{behalf.peer} through the page"
        return AuditEntry(self._clock(), who, peer, what, facts, result)

    @contextmanager
    def _admitted(self, context: Any, method: str) -> Iterator[None]:
        certificate = b""
        behalf = Behalf.of(context)
        if self._identify is not None and (behalf is not None or _is_tls(context)):
            certificate = shown_certificate(context) if behalf is None else behalf.certificate
            identity = self._identify(certificate, method == _RENEW)
            _CALLER.set(identity)
            check_call(identity, method)
        else:
            _CALLER.set(LOCAL)
        call = _OpenCall(certificate, asyncio.current_task())
        # Behind the checks: a call that was refused has nothing to be ended.
        self._open.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.error is None or call.task is None:
                raise
            # `end_stale_calls` has cancelled it, not the client: the task lives on to answer with the reason.
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
                # A change in progress does not mind, so the call that puts its own caller out has its answer.
                call.error = error
                call.task.cancel()


def _is_tls(context: Any) -> bool:
    return bool(context.auth_context().get("transport_security_type") == [b"ssl"])

"""Visitors of the page, and whether they may steer.

The rule: the aggregator decides what a person may do; the page only takes away from it. Outside of this machine
the visitor is whoever their certificate says. It goes along with each call to the aggregator, which refuses what
that role may not do. On this machine everybody may look. Who has opened the sign-in link, which only the owner of
the data folder can read, may also steer.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cryptography import x509
from starlette.requests import Request

from fedgrpc.errors import Exhausted, NotEnrolled, WrongIdentity
from fedgrpc.identity.certificates import pem_of, uris_of
from fedgrpc.identity.roles import OPERATOR_ROLES, Role, identity_from
from fedgrpc.rpc.behalf import Behalf

COOKIE: Final = "fedgrpc-page"
# Put there by the connection (`fedgrpc.web.listening`), and by nobody else.
CERTIFICATE: Final = "certificate"
_SESSION_S: Final = 12 * 3600.0
_MAX_SESSIONS: Final = 100
_STEERING: Final = (Role.OPERATOR, Role.ADMIN)
# Wrong secrets that are answered in a minute: each is 256 bits, so that guessing is hopeless anyway.
_TRIES: Final = 20
_TRIES_S: Final = 60.0


@dataclass(frozen=True)
class Visitor:
    """Somebody who looks. `behalf` goes along with calls; None: calls are the page's own."""

    name: str = ""
    role: str = ""
    steers: bool = False
    behalf: Behalf | None = None


class Visitors(Protocol):
    """Knows the visitor of a request."""

    # Whether somebody may sign in by a secret.
    signs_in: bool

    def visitor(self, request: Request) -> Visitor:
        """Return who makes the request. Raises `NotEnrolled` and `WrongIdentity` for one who may not look."""


class CertifiedVisitors:
    """Visitors with certificates of operators, checked by the handshake and again with each call."""

    signs_in = False

    def visitor(self, request: Request) -> Visitor:
        """See `Visitors`."""
        der = getattr(request.state, CERTIFICATE, None)
        if not der:
            raise NotEnrolled(
                "this page asks browsers for the certificate of an operator: make one with `fedgrpc operator "
                "create`, then put it into the browser (docs/guide/operate.md)"
            )
        certificate = x509.load_der_x509_certificate(der)
        identity = identity_from(uris_of(certificate))
        if identity.role not in OPERATOR_ROLES:
            raise WrongIdentity(f"{identity} is a device; the page is for viewers, operators and admins")
        peer = f"{request.client.host}:{request.client.port}" if request.client else ""
        behalf = Behalf(pem_of(certificate), peer)
        return Visitor(identity.name, identity.role.value, identity.role in _STEERING, behalf)


class LocalVisitors:
    """Visitors on this machine: all may look, and those with a session may steer."""

    signs_in = True

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.secret = secrets.token_urlsafe(32)
        self._clock = clock
        # By the text of their cookies: when they end.
        self._sessions: dict[str, float] = {}
        self._tries: Sequence[float] = ()

    def visitor(self, request: Request) -> Visitor:
        """See `Visitors`."""
        ends_at = self._sessions.get(request.cookies.get(COOKIE, ""), 0.0)
        if self._clock() < ends_at:
            return Visitor(role="signed in", steers=True)
        return Visitor()

    def sign_in(self, secret: str) -> str:
        """Return the cookie of a new session. Raises `WrongIdentity` for another secret, and `Exhausted`."""
        now = self._clock()
        self._tries = [at for at in self._tries if now - at < _TRIES_S]
        if len(self._tries) >= _TRIES:
            raise Exhausted("too many wrong links; try again in a minute", retry_after_s=_TRIES_S)
        if not hmac.compare_digest(secret.encode(), self.secret.encode()):
            self._tries = [*self._tries, now]
            raise WrongIdentity("this is not the link of this page; a restart of the aggregator makes a new one")
        self._sessions = {cookie: ends_at for cookie, ends_at in self._sessions.items() if now < ends_at}
        if len(self._sessions) >= _MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        cookie = secrets.token_urlsafe(32)
        self._sessions[cookie] = now + _SESSION_S
        return cookie

    def sign_out(self, cookie: str) -> None:
        """End a session."""
        self._sessions.pop(cookie, None)

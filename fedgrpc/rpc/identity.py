"""Identity of a caller: the session that its process names, and its certificate, verified by mutual TLS.

Both come with the call and not in a message, so that a certificate can take the session's place.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from fedgrpc.errors import UsageError, WrongIdentity

_NAMES = ("x509_common_name", "x509_subject_alternative_name")
SESSION_KEY: Final = "fedgrpc-session"
_SESSION: Final = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{1,64})")


@dataclass(frozen=True)
class Session:
    """One start of one worker: random ids of its state folder and of its process.

    Empty for a worker that names no session. All such workers count as one process.
    """

    folder: str = ""
    process: str = ""

    def __str__(self) -> str:
        return f"{self.folder}.{self.process}" if self.folder else ""

    @classmethod
    def begin(cls, folder: str) -> Session:
        """Return the session of a process that starts now."""
        return cls(folder, secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> Session:
        """Return the session of a text that `str` gave. Raises `UsageError`."""
        if not text:
            return cls()
        match = _SESSION.fullmatch(text)
        if match is None:
            raise UsageError(f"{SESSION_KEY} must be FOLDER.PROCESS, 1 to 64 of letters, digits, '_' and '-' each")
        return cls(*match.groups())

    @classmethod
    def of(cls, context: Any) -> Session:
        """Return the caller's session. Raises `UsageError`."""
        found = (value for key, value in context.invocation_metadata() or () if key == SESSION_KEY)
        return cls.parse(str(next(found, "")))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that carries the session in each call."""
        return ((SESSION_KEY, str(self)),) if self.folder else ()


def peer_of(context: Any) -> str:
    """Return address and port of the caller, for a log."""
    return unquote(str(context.peer())).partition(":")[2]


def certificate_names(context: Any) -> frozenset[str]:
    """Return the common and alternative names (RFC 5280) of the peer's certificate. Empty without one."""
    found = context.auth_context()
    return frozenset(value.decode("utf-8", "replace") for kind in _NAMES for value in found.get(kind, ()))


@dataclass(frozen=True)
class Access:
    """Rules for servers whose clients must show certificates. The default has no rules.

    With `own_names`, a worker acts only under a name of its certificate. `operators` are the names of those
    who may steer the run. Without any, everybody who may connect may steer it.
    """

    own_names: bool = False
    operators: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        """True if there is a rule."""
        return self.own_names or bool(self.operators)

    def check_worker(self, context: Any, worker: str) -> None:
        """Raise `WrongIdentity` if the caller may not act as `worker`."""
        if self.own_names and worker not in (names := certificate_names(context)):
            raise WrongIdentity(f"a certificate for {_listed(names)} does not speak for worker {worker[:80]!r}")

    def check_operator(self, context: Any) -> None:
        """Raise `WrongIdentity` if the caller may not steer the run."""
        if self.operators and self.operators.isdisjoint(names := certificate_names(context)):
            raise WrongIdentity(f"a certificate for {_listed(names)} is not an operator's")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"

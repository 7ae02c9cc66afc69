"""Who calls: the process, by the session it names, and the certificate that mutual TLS has verified.

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
    """One start of one worker: the random id of its state folder, and one of its process.

    Empty for a worker that names none: all of those are taken for one process.
    """

    folder: str = ""
    process: str = ""

    def __str__(self) -> str:
        return f"{self.folder}.{self.process}" if self.folder else ""

    @classmethod
    def begin(cls, folder: str) -> Session:
        """The session of a process that starts now."""
        return cls(folder, secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> Session:
        """Read what `str` gives. Raises `UsageError`."""
        if not text:
            return cls()
        match = _SESSION.fullmatch(text)
        if match is None:
            raise UsageError(f"{SESSION_KEY} must be FOLDER.PROCESS, 1 to 64 of letters, digits, '_' and '-' each")
        return cls(*match.groups())

    @classmethod
    def of(cls, context: Any) -> Session:
        """The caller's. Raises `UsageError`."""
        found = (value for key, value in context.invocation_metadata() or () if key == SESSION_KEY)
        return cls.parse(str(next(found, "")))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """As it travels with each call."""
        return ((SESSION_KEY, str(self)),) if self.folder else ()


def peer_of(context: Any) -> str:
    """Address and port of the caller, for a log."""
    return unquote(str(context.peer())).partition(":")[2]


def certificate_names(context: Any) -> frozenset[str]:
    """The common name and the subject alternative names (RFC 5280) of the peer's certificate; none without one."""
    found = context.auth_context()
    return frozenset(value.decode("utf-8", "replace") for kind in _NAMES for value in found.get(kind, ()))


@dataclass(frozen=True)
class Access:
    """Rules that hold where clients must show certificates; as made, there are none.

    With `own_names` a worker acts under a name of its certificate alone. `operators` are the names of those who
    may steer the run; without any, everybody who may connect does.
    """

    own_names: bool = False
    operators: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        """Whether there is a rule."""
        return self.own_names or bool(self.operators)

    def check_worker(self, context: Any, worker: str) -> None:
        """Raise `WrongIdentity` when the caller is not to act as `worker`."""
        if self.own_names and worker not in (names := certificate_names(context)):
            raise WrongIdentity(f"a certificate for {_listed(names)} does not speak for worker {worker[:80]!r}")

    def check_operator(self, context: Any) -> None:
        """Raise `WrongIdentity` when the caller is not to steer the run."""
        if self.operators and self.operators.isdisjoint(names := certificate_names(context)):
            raise WrongIdentity(f"a certificate for {_listed(names)} is not an operator's")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"

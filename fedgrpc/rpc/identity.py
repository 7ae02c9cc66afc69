"""The session that a worker's process names with each call, which tells one start of one device from another."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import unquote

from fedgrpc.errors import UsageError

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


def is_on_this_machine(context: Any) -> bool:
    """Return whether the caller is on this machine: over a unix socket, or from loopback."""
    kind, _, peer = unquote(str(context.peer())).partition(":")
    if kind == "unix":
        return True
    try:
        return ip_address(peer.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False

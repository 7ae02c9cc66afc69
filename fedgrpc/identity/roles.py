"""Roles, and the identity that a certificate gives its bearer.

The rule: name and role come from one URI among the certificate's alternative names, and from nowhere else:

    fedgrpc://FLEET/ROLE/NAME            what the built-in authority writes
    spiffe://DOMAIN/fedgrpc/ROLE/NAME    what SPIRE and others can write

A certificate with none of them, or with two, gives no identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fedgrpc.errors import NotEnrolled, UsageError, WrongIdentity

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_URI: Final = re.compile(r"(?:fedgrpc://[^/]{1,255}|spiffe://[^/]{1,255}/fedgrpc)/([a-z]{1,16})/([^/]{1,64})")
# A leaf relays the scores of its evaluators under its own name with this suffix.
EVALUATORS: Final = ".evaluators"


class Role(StrEnum):
    """Role of a caller; `fedgrpc.identity.access` has the table."""

    TRAINER = "trainer"
    EVALUATOR = "evaluator"
    LEAF = "leaf"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    # The bearer of a join token, until it has a certificate.
    JOINING = "joining"


DEVICE_ROLES: Final = (Role.TRAINER, Role.EVALUATOR, Role.LEAF)
OPERATOR_ROLES: Final = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)


@dataclass(frozen=True)
class Identity:
    """Caller of an RPC. `local`: over plaintext, on this machine, where file permissions decide who may call."""

    name: str
    role: Role
    local: bool = False

    def check_worker(self, worker: str) -> None:
        """Raise `WrongIdentity` unless the caller may act as `worker`."""
        if self.local or worker == self.name:
            return
        if self.role is Role.LEAF and worker == self.name + EVALUATORS:
            return
        raise WrongIdentity(f"{self} does not speak for worker {worker[:80]!r}")

    def check_reader(self) -> None:
        """Raise `WrongIdentity` for a device: it sees what belongs to its tasks."""
        if not self.local and self.role in DEVICE_ROLES:
            raise WrongIdentity(f"{self} gets models with the token of a task")

    def role_of(self, worker: str) -> Role:
        """Return the role in which the caller acts as `worker`, one of its names."""
        return self.role if worker == self.name else Role.EVALUATOR

    def __str__(self) -> str:
        return "a local caller" if self.local else f"the {self.role} {self.name!r}"


LOCAL: Final = Identity("", Role.ADMIN, local=True)


def checked_name(name: str, what: str = "name") -> str:
    """Return the name of a device or an operator. Raises `UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"the {what} {name[:80]!r} must be 1 to 64 of letters, digits, '.', '_' and '-'")
    return name


def uri_of(fleet: str, role: Role, name: str) -> str:
    """Return the URI that gives a certificate's bearer this role and name."""
    return f"fedgrpc://{fleet}/{role}/{name}"


def identity_from(uris: Iterable[str]) -> Identity:
    """Return the identity that these alternative names give. Raises `NotEnrolled`."""
    found = [match for uri in uris if (match := _URI.fullmatch(uri)) is not None]
    if len(found) != 1:
        raise NotEnrolled(
            f"a certificate needs one URI fedgrpc://FLEET/ROLE/NAME as alternative name; this one has {len(found)}"
        )
    role, name = found[0].groups()
    if role not in (*DEVICE_ROLES, *OPERATOR_ROLES) or not _NAME.fullmatch(name):
        raise NotEnrolled(f"a certificate's URI names no role and name: {role[:20]!r}, {name[:80]!r}")
    return Identity(name, Role(role))

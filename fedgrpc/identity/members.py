"""Members of a fleet: devices and operators, each known by the hash of its key.

The rule: a member is its key. Its name and role are the aggregator's to say, and a certificate only repeats them.
Every change is a new record; nothing here knows a clock or a disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from fedgrpc.claims import REASON
from fedgrpc.errors import CertificateStale, NotApproved, NotEnrolled, WrongIdentity
from fedgrpc.identity.roles import DEVICE_ROLES, Identity, Role

_DAY_S: Final = 86_400.0
MIN_LIFE_S: Final = 1.0
MAX_LIFE_S: Final = 3660 * _DAY_S


class MemberState(IntEnum):
    """Right of a member to call."""

    PENDING = 1
    ACTIVE = 2
    REVOKED = 3


@dataclass(frozen=True)
class Lives:
    """Lifetimes of certificates, and the time after that in which they may still be renewed. Seconds."""

    device_s: float = _DAY_S
    operator_s: float = 30 * _DAY_S
    grace_s: float = 30 * _DAY_S

    def of(self, role: Role) -> float:
        """Return the life of a certificate of this role."""
        return self.device_s if role in DEVICE_ROLES else self.operator_s


@dataclass(frozen=True)
class Member:
    """One device or operator. Times are seconds since 1970.

    `key_sha256` is empty for one that is known by its name alone: revoked where certificates come from another
    authority than the built-in one. `authority` made the newest certificate that the member has shown.
    """

    name: str
    role: Role
    key_sha256: bytes
    state: MemberState
    joined_at: float
    expires_at: float
    why: str = ""
    tags: tuple[str, ...] = ()
    token: str = ""
    authority: str = ""

    @property
    def identity(self) -> Identity:
        """Return the identity that the member's certificate gives."""
        return Identity(self.name, self.role)

    def check(self, now: float, renewing: bool = False) -> None:
        """Raise when the member may not call now; with `renewing`, when it may not renew its certificate.

        Raises `WrongIdentity` (revoked), `NotApproved` and `CertificateStale`.
        """
        if self.state is MemberState.REVOKED:
            why = f": {self.why}" if self.why else ""
            raise WrongIdentity(f"{self.identity} was revoked{why}")
        if renewing:
            return
        if now >= self.expires_at:
            raise CertificateStale(f"the certificate of {self.name!r} is past its life; renew it")
        if self.state is MemberState.PENDING:
            raise NotApproved(f"{self.name!r} waits for approval: `fedgrpc device approve {self.name}`")

    def may_renew(self, now: float, grace_s: float) -> bool:
        """Return whether the member can still come back with the certificate that it has."""
        return self.state is not MemberState.REVOKED and now < self.expires_at + grace_s

    def check_grace(self, now: float, grace_s: float) -> None:
        """Raise `NotEnrolled` when the certificate is too old to be renewed."""
        if now >= self.expires_at + grace_s:
            raise NotEnrolled(f"the certificate of {self.name!r} is too old to be renewed; join with a new token")

    def approved(self) -> Member:
        """Return the record of a member that may call."""
        return replace(self, state=MemberState.ACTIVE) if self.state is MemberState.PENDING else self

    def revoked(self, why: str) -> Member:
        """Return the record of a member that may call no more."""
        return replace(self, state=MemberState.REVOKED, why=REASON.cleaned(why))

    def renewed(self, until: float) -> Member:
        """Return the record of a member whose certificate counts until then."""
        return replace(self, expires_at=until)

    def renamed(self, name: str) -> Member:
        """Return the record of a member under another name."""
        return replace(self, name=name)

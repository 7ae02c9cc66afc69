"""Who calls, by the certificate that mutual TLS has verified, and what that one may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgrpc.errors import WrongIdentity

_NAMES = ("x509_common_name", "x509_subject_alternative_name")


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

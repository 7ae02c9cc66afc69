"""Roles that a worker may declare, and what the operator lets each of them do.

The rule: a role that is declared grants nothing. With certificates it has to be the certificate's. Without,
what only some may do, those do whom the operator names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedgrpc.errors import UnknownWorker, UsageError, WrongIdentity
from fedgrpc.identity.roles import Identity, Role
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import (
    WORKER_ROLE_AGGREGATOR,
    WORKER_ROLE_EVALUATOR,
    WORKER_ROLE_TRAINER,
    WORKER_ROLE_UNSPECIFIED,
)

# The roles in which the bearer of a certificate may register.
_CLAIMS = {
    Role.TRAINER: (WORKER_ROLE_UNSPECIFIED, WORKER_ROLE_TRAINER),
    Role.EVALUATOR: (WORKER_ROLE_EVALUATOR,),
    Role.LEAF: (WORKER_ROLE_AGGREGATOR,),
}
_A = {Role.TRAINER: "a trainer", Role.EVALUATOR: "an evaluator", Role.LEAF: "a leaf"}
# What a worker may be called, and what fnmatch knows.
_PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,64}")


@dataclass(frozen=True)
class Roles:
    """Names (with * and ?) of those who may be evaluators, aggregators, or give the first model; empty: anyone.

    Scores of evaluators that the operator did not name are shown, but end no run and make no version the best.
    `no_leaves`: why nobody may be an aggregator in this run; empty: there is no reason. `no_trainers`: why nobody
    may be a trainer.
    """

    evaluators: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    initialisers: tuple[str, ...] = ()
    no_leaves: str = ""
    no_trainers: str = ""

    def __post_init__(self) -> None:
        """Raises `UsageError` for a pattern that no worker's name can match, and for leaves that cannot be."""
        for what, patterns in (
            ("evaluator", self.evaluators),
            ("leaf", self.leaves),
            ("initialiser", self.initialisers),
        ):
            for pattern in patterns:
                if not _PATTERN.fullmatch(pattern):
                    raise UsageError(f"{what} must be a worker's name, perhaps with * and ?, not {pattern[:80]!r}")
        if self.leaves and self.no_leaves:
            raise UsageError(f"leaves: {self.no_leaves}")

    def check(self, registration: RegisterRequest) -> None:
        """Raise `WrongIdentity` when the worker may not have the role that it declares."""
        name, role = registration.worker, registration.role
        if role == WORKER_ROLE_EVALUATOR and not _named(name, self.evaluators):
            raise WrongIdentity(f"worker {name[:80]!r} is no evaluator here: --evaluator names those who are")
        if role == WORKER_ROLE_AGGREGATOR and not _named(name, self.leaves):
            raise WrongIdentity(f"worker {name[:80]!r} is no aggregator here: --leaf names those who are")
        if role == WORKER_ROLE_AGGREGATOR and self.no_leaves:
            raise WrongIdentity(f"worker {name[:80]!r} cannot be an aggregator in this run: {self.no_leaves}")
        if role in _CLAIMS[Role.TRAINER] and self.no_trainers:
            raise WrongIdentity(
                f"worker {name[:80]!r} cannot train for this aggregator: {self.no_trainers}; connect it to a leaf"
            )

    def initialises(self, worker: str) -> bool:
        """Return whether this worker may give the first model."""
        return _named(worker, self.initialisers)


def check_claim(identity: Identity, registration: RegisterRequest) -> None:
    """Raise `WrongIdentity` unless the caller may register under this name and in this role."""
    identity.check_worker(registration.worker)
    if not _is_role(identity, registration):
        known = _A[identity.role_of(registration.worker)]
        raise WrongIdentity(f"{registration.worker[:80]!r} is {known} by its certificate, and nothing else")


def check_still(identity: Identity, registration: RegisterRequest) -> None:
    """Raise `UnknownWorker` when the caller's certificate has another role than the worker once registered in."""
    if not _is_role(identity, registration):
        raise UnknownWorker("register again: this name was registered in another role")


def _is_role(identity: Identity, registration: RegisterRequest) -> bool:
    return identity.local or registration.role in _CLAIMS[identity.role_of(registration.worker)]


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

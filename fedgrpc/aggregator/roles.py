"""Which roles a worker may declare, and what the operator lets that role do.

The rule: a role that is declared grants nothing. What only some may do, those do whom the operator names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedgrpc.errors import UsageError, WrongIdentity
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import WORKER_ROLE_AGGREGATOR, WORKER_ROLE_EVALUATOR

# What a worker may be called, and what fnmatch knows.
_PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,64}")


@dataclass(frozen=True)
class Roles:
    """Names (with * and ?) of those who may be evaluators, aggregators, or give the first model; empty: anyone.

    Evaluators that nobody named score, and what they say is shown, but it ends no run and makes no version best.
    """

    evaluators: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    initialisers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `UsageError` for a pattern that no worker's name can match."""
        for what, patterns in (
            ("evaluator", self.evaluators),
            ("leaf", self.leaves),
            ("initialiser", self.initialisers),
        ):
            for pattern in patterns:
                if not _PATTERN.fullmatch(pattern):
                    raise UsageError(f"{what} must be a worker's name, perhaps with * and ?, not {pattern[:80]!r}")

    def check(self, registration: RegisterRequest) -> None:
        """Raise `WrongIdentity` when the worker may not have the role that it declares."""
        name, role = registration.worker, registration.role
        if role == WORKER_ROLE_EVALUATOR and not _named(name, self.evaluators):
            raise WrongIdentity(f"worker {name[:80]!r} is no evaluator here: --evaluator names those who are")
        if role == WORKER_ROLE_AGGREGATOR and not _named(name, self.leaves):
            raise WrongIdentity(f"worker {name[:80]!r} is no aggregator here: --leaf names those who are")

    def initialises(self, worker: str) -> bool:
        """Whether this worker may give the first model."""
        return _named(worker, self.initialisers)


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

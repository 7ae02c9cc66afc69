"""The targets: each takes one input drawn from a `Random`, and raises `FedgrpcError` or nothing.

Anything else that a target raises is a fault, an `AssertionError` of its own included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

Run = Callable[[Random, Path], None]


@dataclass(frozen=True)
class Target:
    """One kind of input; `share` of all inputs, relative to the others."""

    name: str
    run: Run
    share: int = 10


TARGETS: dict[str, Target] = {}


def target(share: int = 10) -> Callable[[Run], Run]:
    """Register a function under its own name."""

    def register(run: Run) -> Run:
        TARGETS[run.__name__] = Target(run.__name__, run, share)
        return run

    return register

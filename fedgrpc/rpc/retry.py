"""Retries: capped exponential backoff with full jitter, and a bounded number of tries.

Full jitter spreads a fleet that lost its aggregator at the same instant
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fedgrpc.errors import FedgrpcError, LinkError

T = TypeVar("T")

# Shared: seeding one for each call would cost more than the retries of most calls.
_CHANCE = random.Random()


@dataclass(frozen=True)
class Backoff:
    """The wait before try n (from 0) is uniform in [0, min(cap_s, first_s * factor**n)]."""

    first_s: float = 0.5
    cap_s: float = 30.0
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.first_s <= self.cap_s and self.factor >= 1):
            raise ValueError(f"need 0 < first_s <= cap_s and factor >= 1, got {self}")

    def ceiling_s(self, attempt: int) -> float:
        """Return the longest wait before try `attempt`, in seconds. It grows to `cap_s` and never overflows."""
        ceiling_s = self.first_s
        # Not factor**attempt: that overflows a float after a thousand failures in a row.
        for _ in range(attempt):
            if ceiling_s >= self.cap_s or self.factor == 1:
                break
            ceiling_s *= self.factor
        return min(self.cap_s, ceiling_s)


@dataclass
class Retries:
    """Waits between failures in a row; `reset` after a success. The state of one reconnect loop."""

    backoff: Backoff = field(default_factory=Backoff)
    rng: random.Random = _CHANCE
    failures: int = 0

    def next_delay_s(self) -> float:
        """Return the wait before the next try, in seconds."""
        delay_s = self.rng.uniform(0, self.backoff.ceiling_s(self.failures))
        self.failures += 1
        return delay_s

    def reset(self) -> None:
        """Start over: the last try succeeded."""
        self.failures = 0


async def with_retries(
    call: Callable[[], Awaitable[T]],
    *,
    attempts: int,
    backoff: Backoff | None = None,
    retry_on: tuple[type[FedgrpcError], ...] = (LinkError,),
    rng: random.Random | None = None,
) -> T:
    """Await `call()` up to `attempts` times. Raises the last failure, and at once any error not listed."""
    retries = Retries(backoff or Backoff(), rng or _CHANCE)
    while True:
        try:
            return await call()
        except retry_on:
            delay_s = retries.next_delay_s()
            # The failure that uses up the last try is raised without a wait before it.
            if retries.failures >= attempts:
                raise
        await asyncio.sleep(delay_s)

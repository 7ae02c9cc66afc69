"""What goes wrong in a simulated world, and how often: all drawn from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedgrpc.rounds.policy import RoundPolicy


@dataclass(frozen=True)
class Faults:
    """Probabilities for each message, write or task; mean times in seconds between the others (None: never).

    `crash_at_write` kills the aggregator while it waits for its disk. Messages that overtake each other come from
    `delay_s`: each is delayed by its own draw.
    """

    delay_s: float = 0.02
    loss: float = 0.0
    duplicate: float = 0.0
    partition_every_s: float | None = None
    partition_s: float = 5.0
    worker_crash_every_s: float | None = None
    aggregator_crash_every_s: float | None = None
    crash_at_write: float = 0.0
    write_s: float = 0.02
    down_s: float = 2.0
    wall_step_s: float = 0.0
    clock_drift: float = 0.0
    failure: float = 0.0
    bad_update: float = 0.0


@dataclass(frozen=True)
class Choosing:
    """How the aggregator chooses workers and deadlines."""

    oort: bool
    learned_deadline: bool


@dataclass(frozen=True)
class Habits:
    """What a worker is like: seconds for each part of its task, and the error of its clock's rate."""

    download_s: float
    train_s: float
    chunk_s: float
    chunks: int
    clock_rate: float

    @property
    def task_s(self) -> float:
        """About how long a task takes on a good day."""
        return (self.download_s + self.train_s + self.chunk_s * self.chunks) / self.clock_rate


def draw_faults(rng: np.random.Generator) -> Faults:
    """Each kind of fault is there in about half of the worlds, from rare to constant."""

    def maybe(low: float, high: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < 0.5 else 0.0

    return Faults(
        delay_s=float(10 ** rng.uniform(-2.5, 0.0)),
        loss=maybe(0.01, 0.3),
        duplicate=maybe(0.01, 0.3),
        partition_every_s=maybe(10, 60) or None,
        partition_s=float(rng.uniform(1, 15)),
        worker_crash_every_s=maybe(5, 60) or None,
        aggregator_crash_every_s=maybe(3, 40) or None,
        crash_at_write=maybe(0.01, 0.15),
        write_s=float(10 ** rng.uniform(-3, -0.5)),
        down_s=float(rng.uniform(0.1, 5)),
        wall_step_s=maybe(1, 3600),
        clock_drift=maybe(0.01, 0.3),
        failure=maybe(0.01, 0.2),
        bad_update=maybe(0.01, 0.2),
    )


def draw_policy(rng: np.random.Generator, habits: Sequence[Habits]) -> RoundPolicy:
    """Rules that a fleet of such workers can keep when nothing goes wrong, and often not when something does."""
    workers = len(habits)
    slowest_s = max(one.task_s for one in habits)
    participants = int(rng.integers(1, workers + 1))
    quorum = int(rng.integers(1, participants + 1))
    late: Literal["carry", "discard"] = "carry" if rng.random() < 0.5 else "discard"
    buffered = late == "carry" and rng.random() < 0.5
    return RoundPolicy(
        late=late,
        max_staleness=int(rng.integers(1, 4)),
        buffer_size=quorum + int(rng.integers(0, 2)) if buffered else None,
        min_workers=int(rng.integers(1, workers + 1)),
        min_sample_size=int(rng.integers(1, participants + 1)),
        max_participants=participants if rng.random() < 0.7 else None,
        fraction=float(rng.choice([0.3, 0.6, 1.0])),
        over_selection=1.0 if buffered else float(rng.choice([1.0, 1.3, 2.0])),
        quorum=quorum,
        deadline_s=float(rng.uniform(2, 5) * slowest_s + 2),
        lease_s=float(rng.uniform(1.5, 6)),
        selection_window_s=float(rng.choice([0.0, 0.5, 2.0])),
        selection_timeout_s=float(rng.uniform(5, 20)) if rng.random() < 0.3 else None,
        reconnect_grace_s=(0.0, 2.0, 20.0)[workers % 3],
    )


def draw_habits(rng: np.random.Generator, drift: float) -> Habits:
    """One worker; some are far slower than others."""
    return Habits(
        download_s=float(10 ** rng.uniform(-1.5, 0.3)),
        train_s=float(10 ** rng.uniform(-0.7, 1.1)),
        chunk_s=float(10 ** rng.uniform(-1.5, 0.3)),
        chunks=int(rng.integers(1, 5)),
        clock_rate=float(1 + rng.uniform(-drift, drift)),
    )

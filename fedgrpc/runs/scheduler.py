"""Scheduler of idle workers: one fleet shared by many runs. Pure.

The rule: a run whose round has waited longer than `patience_s` comes first, the longest wait before the others,
so that no run starves. Then come higher priorities. Then, with the order `LEAST_SUPPLIED`, come runs that fewer
workers can serve, and of those with the same workers the one with the fewest tasks left. That is Venn's idea
(arXiv 2312.08298, section 4): scarce workers go to the runs that can use no others, and short runs end first.

A run takes no workers that are too few to open its round: others use them meanwhile. Once it has waited for longer
than `patience_s` it collects them, as long as enough are alive.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fedgrpc.errors import UsageError

PATIENCE_S: Final = 60.0
MOST_PRIORITY: Final = 1000
MOST_QUOTA: Final = (1 << 32) - 1
# Of two supplies within this factor, neither is scarcer: fleets come and go by a few workers.
_ALIKE: Final = 1.25


class Order(Enum):
    """Order of runs of one priority that have not waited too long."""

    LEAST_SUPPLIED = "least-supplied"
    FIFO = "fifo"


@dataclass(frozen=True)
class Share:
    """Grant of an operator to a run: its priority, and the most workers that it may have at the same time.

    Raises:
        UsageError: a value is out of range.
    """

    priority: int = 0
    quota: int | None = None

    def __post_init__(self) -> None:
        if not -MOST_PRIORITY <= self.priority <= MOST_PRIORITY:
            raise UsageError(f"priority must be from -{MOST_PRIORITY} to {MOST_PRIORITY}, not {self.priority}")
        if self.quota is not None and not 1 <= self.quota <= MOST_QUOTA:
            raise UsageError(f"quota must be from 1 to {MOST_QUOTA}, not {self.quota}")


@dataclass(frozen=True)
class Demand:
    """Wish of one run for workers.

    `wanted` are those that its round would take now, of which at least `needed` must be idle together. `supply`
    counts the live workers that may serve it, `busy` those that do. `tasks_left` is what the run still needs to
    its end, as far as is known. Its round has waited for `waited_s`; the run itself began at `began_at`.
    """

    run: str
    wanted: int
    needed: int
    supply: int
    busy: int = 0
    tasks_left: float = math.inf
    waited_s: float = 0.0
    began_at: float = 0.0
    share: Share = Share()

    @property
    def room(self) -> int:
        """Number of workers that the run may get now."""
        quota = self.share.quota
        return self.wanted if quota is None else max(0, min(self.wanted, quota - self.busy))

    @property
    def possible(self) -> bool:
        """True if its round can open with the workers that are alive, within its quota."""
        quota = self.share.quota
        return self.needed <= (self.supply if quota is None else min(self.supply, quota))


def ordered(
    demands: Iterable[Demand], patience_s: float = PATIENCE_S, order: Order = Order.LEAST_SUPPLIED
) -> list[Demand]:
    """Return the demands in the order in which they are served."""

    def key(demand: Demand) -> tuple[float, ...]:
        # A run that cannot be served would be first for ever.
        overdue = demand.possible and demand.waited_s > patience_s
        first = -demand.waited_s if overdue else math.inf
        scarce = (0.0, 0.0)
        if order is Order.LEAST_SUPPLIED:
            scarce = (_magnitude(demand.supply), demand.tasks_left)
        return (first, -demand.share.priority, *scarce, demand.began_at)

    return sorted(demands, key=lambda demand: (key(demand), demand.run))


def share_out(
    demands: Sequence[Demand],
    idle: Mapping[str, Collection[str]],
    patience_s: float = PATIENCE_S,
    order: Order = Order.LEAST_SUPPLIED,
) -> dict[str, str]:
    """Return which run each idle worker is for. `idle` has, by worker, the runs that it may serve.

    Workers that no run can use now are left out. A run has first those that the fewest others want.
    """
    wanting = ordered((demand for demand in demands if demand.room), patience_s, order)
    names = {demand.run for demand in wanting}
    # How many runs want each worker that is still free.
    sought = {worker: len(names.intersection(runs)) for worker, runs in idle.items()}
    given: dict[str, str] = {}
    for demand in wanting:
        free = [worker for worker in idle if worker not in given and demand.run in idle[worker]]
        collects = demand.possible and demand.waited_s > patience_s
        if len(free) >= demand.needed or collects:
            free.sort(key=lambda worker: sought[worker])
            given.update(dict.fromkeys(free[: demand.room], demand.run))
    return given


def _magnitude(supply: int) -> float:
    """Return the supply rounded down to a power of `_ALIKE`."""
    return float(math.floor(math.log(max(1, supply), _ALIKE)))

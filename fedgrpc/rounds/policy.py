"""The rules of a round: how many take part, how long it may last, when it counts. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import accumulate
from typing import Literal

from fedgrpc import claims
from fedgrpc.errors import UsageError


class TaskKind(IntEnum):
    """Kind of the tasks of a round, numbered as on the wire."""

    TRAIN = 1
    EVALUATE = 2
    INITIALIZE = 3


@dataclass(frozen=True)
class RoundPolicy:
    """Rules of a round.

    A round opens once `min_workers` are idle, and waits up to `selection_window_s` more for the other live
    ones. It aims at `fraction` of the live workers, at least `min_sample_size` and at most `max_participants`,
    and asks `over_selection` times as many (Bonawitz et al. 2019, arXiv 1902.01046). It commits as soon as the
    aim is reached (or, with at least `quorum` updates, once these weigh `weight_aim`), or at the deadline with at
    least `quorum` updates; else it is abandoned. With `max_share` no worker has a larger share of the mean, and
    weight counts to `weight_aim` once there are updates enough to keep to it. The deadline is `deadline_s`, or
    what is learned of the workers, from `deadline_floor_s` to `deadline_s`.

    Late tasks are discarded, or carried over into the next rounds until `max_staleness` versions were committed
    since their worker got the model. With `buffer_size` nobody waits for a round (FedBuff, arXiv 2106.06639): the
    share of workers given by `fraction` and `max_participants` is always at work, and every `buffer_size` updates
    make a version.

    A worker that tells of fewer than `min_new_examples` new ones takes part in no round of training. By default
    that is 1 in a run without a last round, and 0 in any other (`RunRules.min_new_examples`).

    With `poisson_rate` every idle worker is asked by a coin of its own, which falls so with that chance, once in a
    round: no lost task is given to another, and a round commits whatever came, were it nothing (`quorum` 0). What
    a round makes then tells nobody who was asked.

    After a restart, an open round lasts at least `reconnect_grace_s` longer, so that workers can reconnect and
    deliver what they finished meanwhile.
    """

    min_workers: int = 2
    min_sample_size: int = 1
    max_participants: int | None = None
    fraction: float = 1.0
    over_selection: float = 1.0
    quorum: int = 1
    deadline_s: float = 600.0
    lease_s: float = 30.0
    selection_window_s: float = 1.0
    selection_timeout_s: float | None = None
    weight_aim: float | None = None
    max_share: float | None = None
    deadline_floor_s: float = 0.0
    late: Literal["discard", "carry"] = "discard"
    max_staleness: int = 5
    buffer_size: int | None = None
    reconnect_grace_s: float = 60.0
    min_new_examples: int | None = None
    poisson_rate: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "min_workers must be at least 1": self.min_workers >= 1,
            "min_sample_size must be at least 1": self.min_sample_size >= 1,
            "max_participants must be at least min_sample_size": self.max_participants is None
            or self.max_participants >= self.min_sample_size,
            "fraction must be above 0 and at most 1": 0 < self.fraction <= 1,
            "over_selection must be from 1 to 10": 1 <= self.over_selection <= 10,
            "quorum must be from 1 to the number of participants": self.quorum >= (self.poisson_rate is None)
            and (self.max_participants is None or self.quorum <= self.max_participants),
            "deadline_s must be a positive number of seconds": 0 < self.deadline_s < math.inf,
            "lease_s must be a positive number of seconds": 0 < self.lease_s < math.inf,
            "selection_window_s must not be negative": 0 <= self.selection_window_s < math.inf,
            "selection_timeout_s must be a positive number of seconds": self.selection_timeout_s is None
            or 0 < self.selection_timeout_s < math.inf,
            "reconnect_grace_s must be a number of seconds, or 0": 0 <= self.reconnect_grace_s < math.inf,
            "min_new_examples must be from 0 to 2^40": self.min_new_examples is None
            or 0 <= self.min_new_examples <= claims.EXAMPLES.most,
        }
        buffered = self.buffer_size is not None
        checks |= {
            "weight_aim must be positive": self.weight_aim is None or self.weight_aim > 0,
            "max_share must be above 0 and at most 1": self.max_share is None or 0 < self.max_share <= 1,
            "deadline_floor_s must be from 0 to deadline_s": 0 <= self.deadline_floor_s <= self.deadline_s,
            "late must be 'discard' or 'carry'": self.late in ("discard", "carry"),
            "max_staleness must be at least 1": self.max_staleness >= 1,
            "buffer_size must be at least 1 and the quorum": self.buffer_size is None
            or self.buffer_size >= self.quorum,
            "buffer_size goes with late = 'carry'": not buffered or self.late == "carry",
            "buffer_size goes with over_selection = 1": not buffered or self.over_selection == 1,
        }
        if self.poisson_rate is not None:
            checks |= self._checks_of_sampling(self.poisson_rate)
        for message, holds in checks.items():
            if not holds:
                raise UsageError(message)

    def _checks_of_sampling(self, rate: float) -> dict[str, bool]:
        """Return what has to hold for each device to be sampled by its coin alone."""
        return {
            "poisson_rate must be above 0 and at most 1": 0 < rate <= 1,
            "poisson_rate goes with quorum = 0: a round that is abandoned would tell who was not asked": (
                self.quorum == 0
            ),
            "poisson_rate goes without fraction, max_participants and over_selection": (
                self.fraction == 1 and self.max_participants is None and self.over_selection == 1
            ),
            "poisson_rate goes without weight_aim": self.weight_aim is None,
            "poisson_rate goes with late = 'discard'": self.late == "discard",
        }

    @property
    def least(self) -> int:
        """Number of tasks below which a round does not open."""
        return 0 if self.poisson_rate is not None else max(self.quorum, self.min_sample_size)

    def aim(self, live_count: int) -> int:
        """Return how many updates a round wants of `live_count` workers."""
        wanted = max(_ceil(self.fraction * live_count), self.min_sample_size, self.quorum)
        return wanted if self.max_participants is None else min(wanted, self.max_participants)

    def ask(self, aim: int) -> int:
        """Return how many tasks to give out to get `aim` updates."""
        return _ceil(aim * self.over_selection)

    @property
    def needed_idle(self) -> int:
        """Number of idle workers that a round needs to open."""
        return max(self.min_workers, self.min_sample_size, self.quorum)

    def for_kind(self, kind: TaskKind) -> RoundPolicy:
        """Return the policy of rounds of that kind: one worker gives initial weights, all who come evaluate."""
        if kind is TaskKind.TRAIN:
            return self
        policy = replace(
            self,
            weight_aim=None,
            deadline_floor_s=0.0,
            late="discard",
            buffer_size=None,
            min_workers=1,
            min_sample_size=1,
            quorum=1,
            over_selection=1.0,
            min_new_examples=None,
            poisson_rate=None,
        )
        if kind is TaskKind.INITIALIZE:
            return replace(policy, max_participants=1, selection_window_s=0.0)
        timeout_s = self.lease_s + self.selection_window_s
        return replace(policy, max_participants=None, fraction=1.0, selection_timeout_s=timeout_s)


def _ceil(value: float) -> int:
    """Return the ceiling, up to rounding: 10 x 1.1 is 11.000000000000002 in floats, and counts as 11."""
    return math.ceil(value - 1e-9 * value)


# Among so few participants, one that is more than half is nothing to report.
_FEW = 3
_TINY = 1e-12


@dataclass(frozen=True)
class Dominance:
    """A worker that is more than half of a mean of more than three, and its share."""

    worker: str
    share: float


def dominant(weights: Mapping[str, float]) -> Dominance | None:
    """Return the worker that is over half of the mean, given the summed weight of each; None: there is none."""
    there = {worker: weight for worker, weight in weights.items() if weight > 0}
    if len(there) <= _FEW:
        return None
    worker = max(there, key=lambda name: there[name])
    share = there[worker] / sum(there.values())
    return Dominance(worker, share) if share > 0.5 else None


def capped(weights: Sequence[float], max_share: float, counts: Sequence[int] | None = None) -> list[float]:
    """Return the weights, the largest lowered until none is more than `max_share` of their sum.

    All that are lowered get one level c, the least change that suffices (water-filling):

        c = max_share * (c * lowered + sum of the others)

    Weight `i` stands for `counts[i]` workers (default 1), and none of them gets more than its share. Fewer workers
    than 1 / `max_share` cannot keep to it: then all of them weigh the same.
    """
    sizes = [1] * len(weights) if counts is None else list(counts)
    level = _level(sorted((w / n, n) for w, n in zip(weights, sizes, strict=True) if w > 0), max_share)
    return [min(weight, level * size) for weight, size in zip(weights, sizes, strict=True)]


def _level(ascending: Sequence[tuple[float, int]], max_share: float) -> float:
    """Return the most that one worker may weigh; `ascending` holds (weight of each, how many)."""
    # Sums from the smallest on: beside a weight of 2^40 the small ones would be lost in a difference of sums.
    sums = list(accumulate(weight * size for weight, size in ascending))
    lowered = 0
    for (weight, size), rest in zip(reversed(ascending), reversed(sums), strict=True):
        if weight <= max_share * (rest + weight * lowered):
            break
        lowered += size
    else:
        return ascending[0][0] if ascending else 0.0
    return math.inf if not lowered else max_share * rest / max(_TINY, 1 - max_share * lowered)


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the deadline of a restored round, and how many seconds restarts have added to the round."""

    seconds: float
    granted_s: float


def left_after_restart(left_s: float, granted_s: float, policy: RoundPolicy) -> TimeLeft:
    """Return the time left of a deadline that was `left_s` away by a wall clock which may have been set meanwhile.

    Workers get `reconnect_grace_s` to deliver what they finished while the aggregator was away. All restarts of a
    round together add at most that or the deadline once more, whichever is longer, so an aggregator that restarts
    again and again still ends its round. `granted_s` is what earlier restarts have added.
    """
    # Clamp: a wall clock set back would otherwise prolong the round without a bound.
    own_s = min(max(left_s, 0.0), policy.deadline_s)
    most_s = max(policy.reconnect_grace_s, policy.deadline_s)
    added_s = min(max(policy.reconnect_grace_s - own_s, 0.0), max(most_s - granted_s, 0.0))
    return TimeLeft(own_s + added_s, granted_s + added_s)

"""How large a share of a mean one worker may be, and who is more than half of one. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

# With fewer participants it is no wonder that one of them is more than half.
_FEW = 3
_TINY = 1e-12


@dataclass(frozen=True)
class Dominance:
    """One worker is more than half of a mean of more than three."""

    worker: str
    share: float


def dominant(weights: Mapping[str, float]) -> Dominance | None:
    """The worker that is over half of the mean, by the summed weight of each worker; None: nobody is."""
    there = {worker: weight for worker, weight in weights.items() if weight > 0}
    if len(there) <= _FEW:
        return None
    worker = max(there, key=lambda name: there[name])
    share = there[worker] / sum(there.values())
    return Dominance(worker, share) if share > 0.5 else None


def capped(weights: Sequence[float], max_share: float, counts: Sequence[int] | None = None) -> list[float]:
    """The weights, the largest lowered until none is more than `max_share` of their sum.

    All that are lowered are lowered to one level c, the least change that will do (water-filling):

        c = max_share * (c * lowered + sum of the others)

    Weight `i` stands for `counts[i]` workers (1 without), of which none is to have more than its share. Fewer
    workers than 1 / `max_share` cannot keep to it: then all of them weigh the same.
    """
    sizes = [1] * len(weights) if counts is None else list(counts)
    level = _level(sorted((w / n, n) for w, n in zip(weights, sizes, strict=True) if w > 0), max_share)
    return [min(weight, level * size) for weight, size in zip(weights, sizes, strict=True)]


def _level(ascending: Sequence[tuple[float, int]], max_share: float) -> float:
    """What one worker may weigh at most; `ascending` are (weight of each, how many)."""
    # From the smallest on: beside a weight of 2^40 the small ones would be lost in a difference of sums.
    sums = list(accumulate(weight * size for weight, size in ascending))
    lowered = 0
    for (weight, size), rest in zip(reversed(ascending), reversed(sums), strict=True):
        if weight <= max_share * (rest + weight * lowered):
            break
        lowered += size
    else:
        return ascending[0][0] if ascending else 0.0
    return math.inf if not lowered else max_share * rest / max(_TINY, 1 - max_share * lowered)

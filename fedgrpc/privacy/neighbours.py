"""Masking graph of a round: which devices agree on masks with each other (SecAgg+, eprint 2020/704).

Up to 100 devices each is a neighbour of all others. Above, or where fewer are wanted, each has an even `degree`
of them on a ring of a random order. The aggregator draws the order anew each round, so no device can choose its
neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

COMPLETE_UP_TO: Final = 100
# With this degree a third of all may drop out, and some device is left without a majority of its neighbours in
# fewer than 7 of 1,000 rounds (hypergeometric tail over 256 to 10,000 devices: 2e-5 at 256, 3.4e-3 at 1,000).
_DEGREE_PER_DOUBLING: Final = 15


def neighbours(names: Sequence[str], rng: np.random.Generator, wanted: int = 0) -> Mapping[str, tuple[str, ...]]:
    """Return the neighbours of each of `names` (distinct), sorted. Being a neighbour is mutual.

    `wanted` is as in `degree_of`.
    """
    degree = degree_of(len(names), wanted)
    if degree == len(names) - 1:
        return {name: tuple(sorted(set(names) - {name})) for name in names}
    ring = [sorted(names)[place] for place in rng.permutation(len(names))]
    reach = [step for step in range(-degree // 2, degree // 2 + 1) if step]
    return {
        name: tuple(sorted(ring[(place + step) % len(ring)] for step in reach)) for place, name in enumerate(ring)
    }


def degree_of(count: int, wanted: int = 0) -> int:
    """Return the number of neighbours of each of `count` devices: `wanted` (even), or all if there are fewer.

    0: so many that a third of all may drop out.
    """
    if wanted:
        return min(count - 1, wanted)
    if count <= COMPLETE_UP_TO:
        return count - 1
    return min(count - 1, 2 * math.ceil(_DEGREE_PER_DOUBLING * math.log2(count) / 2))


def threshold_of(degree: int, colluding: int = 0) -> int:
    """Return how many of a device's `degree` neighbours must answer for it, of whom `colluding` work against it.

    More than half of both together: 2 t > degree + colluding. Honest neighbours answer once, colluding ones both
    ways. So no aggregator gets t shares of each of a device's two secrets, nor two questions confirmed by t each.
    """
    return (degree + colluding) // 2 + 1

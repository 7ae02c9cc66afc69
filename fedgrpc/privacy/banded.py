"""Noise of a run's versions that mostly cancels out: banded matrix factorization (DP-MF).

A model is the sum of its rounds, A x with A lower-triangular of ones. Released is A (x + C^-1 z) with independent
normal z: the sums carry A C^-1 z, and privacy is that of C x + z (Denisov et al., arXiv 2202.08312). Here C^-1 is
the Toeplitz matrix of the first `bands` coefficients of (1 - t)^(1/2), the inverse of the square root of A
(Kalinin et al., arXiv 2505.12128):

    d_0 = 1,   d_j = d_(j-1) (2 j - 3) / (2 j):   1, -1/2, -1/8, -1/16, ...

So the noise of a round is a sum over the streams of the last `bands` rounds: no state, and a round that is
computed again draws the same. One band is independent noise. The banded C of arXiv 2306.08153 has an inverse
without an end, whose noise needs all rounds before.

How far one device moves C x, with differences no longer than 1 in rounds at least `separation` apart: C is the
Toeplitz matrix of c_t = sum_(j=1..bands-1) |d_j| c_(t-j), which are above 0 and fall. An entry of C^T C,

    (C^T C)_(u,v) = sum_s c_(s + v - u) c_s    over 0 <= s < rounds - v,   u <= v

then falls with the later round v and with the distance v - u, and products of differences are at most 1. So nobody
moves it further than a device in the rounds 0, separation, 2 separation, ...
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

# Each band is a stream to draw in each round; from here on, more of them gain little.
MOST_BANDS: Final = 64
_LEAST_ROUNDS: Final = 256


@lru_cache(maxsize=64)
def coefficients(bands: int) -> tuple[float, ...]:
    """Return d_0 to d_(bands - 1)."""
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (2 * j - 3) / (2 * j))
    return tuple(found)


def sensitivity_squared(rounds: int, separation: int, bands: int) -> float:
    """Return how far one device moves all of C x, squared, in units of the most that it adds to one round."""
    # One table serves every number of rounds up to its size.
    known = max(_LEAST_ROUNDS, 1 << (rounds - 1).bit_length())
    return float(_squares(known, separation, bands)[rounds - 1])


@lru_cache(maxsize=64)
def _squares(rounds: int, separation: int, bands: int) -> np.ndarray:
    """Return the sensitivity squared after 1 to `rounds` rounds, rounded up."""
    weights = -np.array(coefficients(bands)[1:])
    c, moved = np.zeros(rounds), np.zeros(rounds)
    c[0] = 1.0
    for t in range(1, rounds):
        reach = min(t, len(weights))
        c[t] = weights[:reach] @ c[t - reach : t][::-1]
    for t in range(rounds):
        moved[t] = c[t] + (moved[t - separation] if t >= separation else 0.0)
    return np.asarray(np.cumsum(moved**2) * (1 + 1e-12))

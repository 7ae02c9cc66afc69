"""Shares of a secret: any `threshold` of them give it back, fewer tell nothing (Shamir, CACM 22(11), 1979).

    f(x) = secret + c_1 x + ... + c_(t-1) x^(t-1)   modulo a prime,   the share of point x is f(x)

The rule: points are distinct and not 0, coefficients are uniform below the prime. Interpolation trusts its shares,
so a share that was changed gives another secret: callers check what they get (see `secure_sum`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

# The least prime above 2^256: every 32 byte secret is below it.
PRIME: Final = (1 << 256) + 297
SHARE_BYTES: Final = 33


def split(
    secret: int, threshold: int, points: Iterable[int], draw: Callable[[int], bytes], prime: int = PRIME
) -> dict[int, int]:
    """Return the share of each of `points`; `draw(n)` returns n random bytes.

    Raises ValueError unless 0 <= secret < prime and 1 <= threshold <= the number of distinct points in 1..prime-1.
    """
    places = set(points)
    if not 0 <= secret < prime:
        raise ValueError("the secret is not below the prime")
    if not 1 <= threshold <= len(places) or not all(0 < point < prime for point in places):
        raise ValueError(f"{threshold} of {len(places)} points cannot share a secret")
    polynomial = [secret, *(_below(prime, draw) for _ in range(threshold - 1))]
    return {point: _value(polynomial, point, prime) for point in sorted(places)}


def combine(shares: Mapping[int, int], prime: int = PRIME, at: int = 0) -> int:
    """Return f(at), after Lagrange, from at least a threshold of `shares` (point -> value): the secret at 0."""
    total = 0
    for point, value in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != point:
                above, below = above * (other - at) % prime, below * (other - point) % prime
        total += value * above * pow(below, -1, prime)
    return total % prime


def _value(polynomial: list[int], point: int, prime: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % prime
    return value


def _below(prime: int, draw: Callable[[int], bytes]) -> int:
    """Return a uniform number below `prime`, from 16 bytes more than it has: the remainder's bias is 2^-128."""
    return int.from_bytes(draw((prime.bit_length() + 7) // 8 + 16)) % prime

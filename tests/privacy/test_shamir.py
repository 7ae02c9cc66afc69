"""Shares of secrets: published vectors and properties."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.privacy.shamir import PRIME, SHARE_BYTES, combine, split


def test_the_prime_is_one() -> None:
    # Miller and Rabin with 40 bases: a composite passes with a chance below 4^-40.
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        squares = [pow(base, odd << shift, PRIME) for shift in range(twos)]
        assert squares[0] == 1 or PRIME - 1 in squares
    assert (1 << 256) < PRIME < 1 << (8 * SHARE_BYTES)


def test_the_worked_example_of_the_literature() -> None:
    # f(x) = 1234 + 166 x + 94 x^2: the example of the encyclopedias, over the integers and modulo 1613.
    coefficients = iter([166, 94])
    shares = split(1234, 3, range(1, 7), lambda size: next(coefficients).to_bytes(size), prime=1613)
    assert shares == {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}
    assert all(combine(dict(some), prime=1613) == 1234 for some in combinations(shares.items(), 3))


@given(secret=st.integers(0, 2**256 - 1), threshold=st.integers(1, 8), more=st.integers(0, 5), seed=st.integers())
def test_any_threshold_of_shares_gives_the_secret_back(secret: int, threshold: int, more: int, seed: int) -> None:
    rng = Random(seed)
    shares = split(secret, threshold, range(1, threshold + more + 1), rng.randbytes)
    some = dict(rng.sample(sorted(shares.items()), threshold))
    assert combine(some) == secret
    assert combine(shares) == secret


@given(secret=st.integers(0, 12), other=st.integers(0, 12), point=st.integers(1, 12))
def test_one_share_too_few_fits_every_secret(secret: int, other: int, point: int) -> None:
    def with_coefficient(secret: int, coefficient: int) -> int:
        return split(secret, 2, (1, 2, point), lambda size: coefficient.to_bytes(size), prime=13)[point]

    fitting = {with_coefficient(secret, c) for c in range(13)}
    assert fitting == {with_coefficient(other, c) for c in range(13)} == set(range(13))


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [(PRIME, 1, [1]), (-1, 1, [1]), (0, 0, [1]), (0, 3, [1, 2]), (0, 2, [1, 1]), (0, 1, [0]), (0, 1, [PRIME])],
)
def test_what_cannot_be_shared_is_refused(secret: int, threshold: int, points: list[int]) -> None:
    with pytest.raises(ValueError, match="secret"):
        split(secret, threshold, points, Random(0).randbytes)

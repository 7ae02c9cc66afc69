"""How large a share of a mean one worker may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rounds.policy import Dominance, capped, dominant

WEIGHTS = st.lists(st.floats(1e-3, 2.0**40), min_size=1, max_size=12)
SHARES = st.floats(0.05, 1.0)


@given(WEIGHTS, SHARES)
def test_nobody_has_more_than_its_share_of_a_capped_mean(weights, share):
    lowered = capped(weights, share)
    assert all(0 < after <= before for after, before in zip(lowered, weights, strict=True))
    # Fewer than 1 / share cannot keep to it: then all weigh the same.
    allowed = max(share, 1 / len(weights))
    assert max(lowered) <= allowed * sum(lowered) * (1 + 1e-6)


@given(WEIGHTS, SHARES)
def test_the_cap_changes_no_more_than_it_must(weights, share):
    lowered = capped(weights, share)
    cut = [after for after, before in zip(lowered, weights, strict=True) if after < before]
    assert len(set(cut)) <= 1, "all that are lowered are lowered to one level"
    kept = [after for after, before in zip(lowered, weights, strict=True) if after == before]
    assert not cut or not kept or max(kept) <= cut[0] * (1 + 1e-9)
    if cut and len(weights) * share > 1 + 1e-6:
        assert cut[0] == pytest.approx(share * sum(lowered), rel=1e-5), "lowered just as far as the share"


@given(WEIGHTS, SHARES, st.data())
def test_a_mean_of_many_workers_is_capped_as_its_workers_would_be(weights, share, data):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=len(weights), max_size=len(weights)))
    means = capped([w * n for w, n in zip(weights, counts, strict=True)], share, counts)
    each = capped([w for w, n in zip(weights, counts, strict=True) for _ in range(n)], share)
    sums, at = [], 0
    for count in counts:
        sums.append(sum(each[at : at + count]))
        at += count
    assert means == pytest.approx(sums, rel=1e-6)


def test_a_share_that_all_keep_to_changes_nothing():
    assert capped([1.0, 2.0, 3.0], 0.5) == [1.0, 2.0, 3.0]
    assert capped([0.0, 1.0, 1.0], 0.5) == [0.0, 1.0, 1.0]
    assert capped([], 0.5) == []


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 4.0}, Dominance("d", 4 / 7)),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.0}, None),
        ({"a": 1.0, "b": 1.0, "c": 99.0}, None),
        ({"a": 1.0, "b": 0.0, "c": 1.0, "d": 99.0}, None),
        ({}, None),
    ],
)
def test_one_of_more_than_three_with_over_half_of_a_mean_is_dominant(weights, found):
    assert dominant(weights) == found

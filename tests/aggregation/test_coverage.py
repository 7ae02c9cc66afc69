"""Each coordinate is averaged over those who trained it; untouched ones have no mean."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedgrpc.aggregation.mean import CoordinateMean, TensorMean
from fedgrpc.submodels.coverage import Coverage

Update = tuple[np.ndarray, float, Coverage]


@st.composite
def coverages(draw: st.DrawFn, shape: tuple[int, ...]) -> Coverage:
    positions: list[np.ndarray | None] = []
    for extent in shape:
        taken = draw(st.none() | st.sets(st.integers(0, extent - 1), min_size=1))
        positions.append(None if taken is None else np.array(sorted(taken)))
    coverage = Coverage(shape, tuple(positions))
    if draw(st.booleans()):
        coverage = coverage.masked(draw(npst.arrays(np.bool_, coverage.sub_shape)))
    return coverage


@st.composite
def rounds(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Update]]:
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, max_side=5))
    updates = []
    for coverage in draw(st.lists(coverages(shape), min_size=1, max_size=5)):
        values = draw(npst.arrays(np.float32, coverage.value_shape, elements=st.floats(-100, 100, width=32)))
        updates.append((values, draw(st.sampled_from([0.0, 1.0, 2.5, 60.0])), coverage))
    return shape, updates


def dumb_mean(shape: tuple[int, ...], updates: list[Update]) -> tuple[np.ndarray, np.ndarray]:
    """One coordinate at a time, from the definition; mean and whether anyone has a say."""
    mean, touched = np.zeros(shape), np.zeros(shape, dtype=bool)
    for coordinate in np.ndindex(*shape):
        total = weights = 0.0
        for values, weight, coverage in updates:
            place = value_at(coordinate, values, coverage)
            if place is not None:
                total += weight * place
                weights += weight
        if weights > 0:
            mean[coordinate], touched[coordinate] = total / weights, True
    return mean, touched


def value_at(coordinate: tuple[int, ...], values: np.ndarray, coverage: Coverage) -> float | None:
    inside = []
    for at, taken in zip(coordinate, coverage.positions, strict=True):
        if taken is None:
            inside.append(at)
        elif at in taken:
            inside.append(taken.tolist().index(at))
        else:
            return None
    if coverage.mask is None:
        return float(values[tuple(inside)])
    if not coverage.mask[tuple(inside)]:
        return None
    before = np.ravel_multi_index(inside, coverage.mask.shape) if inside else 0
    return float(values[np.count_nonzero(coverage.mask.ravel()[:before])])


@given(rounds())
@settings(max_examples=300, deadline=None)
def test_each_coordinate_is_the_mean_over_those_who_cover_it(case: tuple[tuple[int, ...], list[Update]]) -> None:
    shape, updates = case
    mean = CoordinateMean(shape)
    for values, weight, coverage in updates:
        mean.add(values, weight, coverage)
    wanted, touched = dumb_mean(shape, updates)
    if not touched.any():
        with pytest.raises(ValueError, match="positive weight"):
            mean.result()
        return
    untouched = mean.untouched
    assert np.array_equal(~touched, np.zeros(shape, bool) if untouched is None else untouched)
    np.testing.assert_allclose(mean.result(), wanted, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 6), npst.array_shapes(max_side=6), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_full_coverage_by_all_is_tensor_mean_bit_for_bit(count: int, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain, mean, written_out = TensorMean(shape), CoordinateMean(shape), CoordinateMean(shape)
    everywhere = Coverage(shape, tuple(np.arange(extent) for extent in shape))
    for _ in range(count):
        values, weight = rng.standard_normal(shape).astype(np.float32), float(rng.integers(1, 1000))
        plain.add(values, weight)
        mean.add(values, weight, Coverage(shape))
        written_out.add(values, weight, everywhere)
    wanted = plain.result()
    assert np.array_equal(mean.result(), wanted)
    assert np.array_equal(written_out.result(), wanted)
    assert mean.untouched is None
    assert written_out.untouched is None


def test_a_full_update_counts_everywhere_beside_partial_ones() -> None:
    mean = CoordinateMean((2, 2))
    mean.add(np.full((2, 2), 1.0), 1.0)
    mean.add(np.array([[4.0]]), 2.0, Coverage((2, 2), (np.array([0]), np.array([1]))))
    mean.add(np.full((2, 2), 2.0), 1.0)
    assert mean.result().tolist() == [[1.5, 2.75], [1.5, 1.5]]


def test_what_is_taken_is_what_is_added_back() -> None:
    tensor = np.arange(60.0).reshape(3, 4, 5)
    coverage = Coverage((3, 4, 5), (np.array([0, 2]), None, np.array([1, 2, 4])))
    coverage = coverage.masked(np.arange(24).reshape(2, 4, 3) % 3 != 0)
    mean = CoordinateMean((3, 4, 5))
    mean.add(coverage.take(tensor), 7.0, coverage)
    untouched = mean.untouched
    assert untouched is not None
    covered = np.zeros((3, 4, 5))
    coverage.add_to(covered, 1)
    assert np.array_equal(untouched, covered == 0)
    assert np.array_equal(mean.result()[~untouched], tensor[~untouched])


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ((np.array([1, 0]), None), None),
        ((np.array([0, 0]), None), None),
        ((np.array([0, 4]), None), None),
        ((np.array([-1, 2]), None), None),
        ((np.array([], dtype=int), None), None),
        ((np.array([0.0, 1.0]), None), None),
        ((None,), None),
        ((np.array([0]), None), np.ones((4, 3), bool)),
        ((None, None), np.ones((4, 3), np.uint8)),
    ],
)
def test_a_coverage_that_is_none_is_refused(
    positions: tuple[np.ndarray | None, ...], mask: np.ndarray | None
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Coverage((4, 3), positions, mask)


def test_values_of_another_shape_are_refused_and_nothing_has_happened() -> None:
    mean = CoordinateMean((4,))
    coverage = Coverage((4,), (np.array([1, 2]),))
    mean.add(np.ones(2), 1.0, coverage)
    with pytest.raises(ValueError, match="shape"):
        mean.add(np.ones(3), 1.0, coverage)
    with pytest.raises(ValueError, match="shape"):
        mean.add(np.ones(2), 1.0, Coverage((5,), (np.array([1, 2]),)))
    assert mean.result().tolist() == [0, 1, 1, 0]


def test_memory_is_that_of_the_tensor_whatever_the_number_of_updates() -> None:
    shape, coverage = (512, 512), Coverage((512, 512), (np.arange(0, 512, 2), None))
    values = np.ones(coverage.sub_shape, np.float32)
    peaks = []
    for count in (2, 20):
        tracemalloc.start()
        mean = CoordinateMean(shape)
        for _ in range(count):
            mean.add(values, 1.0, coverage)
        mean.result()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 6 * 512 * 512 * 8

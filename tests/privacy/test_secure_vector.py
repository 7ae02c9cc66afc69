"""Updates as vectors of integers, and back from their sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.layout import Array
from fedgrpc.errors import EncodeError, LayoutError, UpdateRefused, UsageError
from fedgrpc.privacy.bounded_rounding import grid_bound
from fedgrpc.privacy.secure_vector import SecureVector, bounds_after

VECTOR = SecureVector(
    {"a": (2, 3), "b": (4,), "c": ()}, {"a": 1.0, "b": 0.01, "c": 5.0}, 8, 6, 5, most_examples=600
)


def _update(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(-VECTOR.bounds[name], VECTOR.bounds[name], shape)
        for name, shape in VECTOR.shapes.items()
    }


def _vector(update: dict[str, Array], examples: int) -> Array:
    return np.concatenate(list(VECTOR.pieces(update, examples, np.random.default_rng(1))))


@given(examples=st.lists(st.integers(0, 10_000), min_size=1, max_size=5))
def test_the_mean_of_the_sum_is_that_of_the_updates_within_a_step_of_each_tensor(examples: list[int]) -> None:
    updates = [_update(seed) for seed in range(len(examples))]
    vectors = [_vector(update, count) for update, count in zip(updates, examples, strict=True)]
    means = VECTOR.means(np.sum(vectors, axis=0))
    weights = [VECTOR.weight_of(count) for count in examples]
    for name, mean in means.items():
        expected = np.average([update[name] for update in updates], axis=0, weights=weights)
        assert np.abs(mean - expected).max() <= 2 * VECTOR.bounds[name] / 255 * (1 + 1e-9)
        assert mean.shape == VECTOR.shapes[name]


def test_all_vectors_together_fit_the_bits_of_the_sum() -> None:
    most = {name: np.full(shape, np.inf) for name, shape in VECTOR.shapes.items()}
    with pytest.raises(EncodeError):
        _vector(most, 600)
    most = {name: np.full(shape, 1e9) for name, shape in VECTOR.shapes.items()}
    total = 5 * _vector(most, 10**9)
    assert VECTOR.sum_bits == 8 + 6 + 3
    assert int(total.max()) < 1 << VECTOR.sum_bits
    assert total.size == VECTOR.size == 12


@pytest.mark.parametrize(("examples", "weight"), [(0, 1), (1, 1), (300, 32), (600, 63), (10**12, 63)])
def test_a_weight_stays_within_its_bits(examples: int, weight: int) -> None:
    assert VECTOR.weight_of(examples) == weight
    assert replace(VECTOR, weight_bits=0).weight_of(examples) == 1


def test_tensors_of_another_task_are_refused() -> None:
    update = _update(1)
    for wrong in ({"a": update["a"]}, update | {"b": np.zeros(5)}, update | {"d": np.zeros(1)}):
        with pytest.raises(LayoutError, match="tensors"):
            _vector(wrong, 1)


def test_sums_of_another_size_or_above_their_weight_are_refused() -> None:
    total = _vector(_update(1), 600)
    with pytest.raises(LayoutError, match="elements"):
        VECTOR.means(total[1:])
    total[0] = 63 * 255 + 1
    with pytest.raises(UpdateRefused, match="secure sum"):
        VECTOR.means(total)


@pytest.mark.parametrize(
    "wrong",
    [{"bounds": {"a": 1.0}}, {"bounds": {**VECTOR.bounds, "c": np.nan}}, {"most_examples": 0}, {"bits": 1}],
)
def test_vectors_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="secure sum"):
        replace(VECTOR, **wrong)  # type: ignore[arg-type]


def test_bounds_follow_the_last_mean_up_to_the_clipping_norm() -> None:
    means = {"small": np.array([0.01, -0.02]), "large": np.array([3.0]), "still": np.zeros(2), "none": np.zeros(0)}
    found = bounds_after(means, clip_norm=1.0)
    assert found == pytest.approx({"small": 0.08, "large": 1.0, "still": 1e-6, "none": 1e-6})


def _within(norm: float, bits: int = 8, count: int = 3) -> SecureVector:
    """A vector of 1,012 values for a norm."""
    shapes = {"a": (10, 100), "b": (12,)}
    return SecureVector(shapes, dict.fromkeys(shapes, grid_bound(norm, 1012, bits)), bits, 0, count, norm=norm)


def _clipped(vector: SecureVector, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    update = {name: rng.standard_normal(shape) for name, shape in vector.shapes.items()}
    length = np.sqrt(sum(np.square(tensor).sum() for tensor in update.values()))
    assert vector.clip_norm is not None
    return {name: tensor * (vector.clip_norm / length) for name, tensor in update.items()}


def _length(tensors: dict[str, Array]) -> float:
    return float(np.sqrt(sum(np.square(tensor).sum() for tensor in tensors.values())))


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_whatever_others_send_one_update_moves_the_released_sum_by_its_norm_at_most(bits: int) -> None:
    """Sensitivity: the sum with a device and without, where others add anything."""
    vector, rng = _within(2.0, bits), np.random.default_rng(bits)
    for seed in range(20):
        own = np.concatenate(list(vector.pieces(_clipped(vector, seed), 7, np.random.default_rng(seed))))
        others = rng.integers(0, 1 << vector.sum_bits, own.size).astype(np.uint64)
        others[-1] = 2
        total = (others + own) % (1 << vector.sum_bits)
        with_it, without = vector.shares(total, 3, 10), vector.shares(others, 2, 10)
        moved = _length({name: with_it[name] - without[name] for name in with_it})
        assert moved <= 2.0 / 10 * (1 + 1e-12)
        # And it does count.
        assert moved > 0.1


def test_the_released_sum_is_that_of_the_updates_over_the_cohort() -> None:
    vector = _within(2.0)
    updates = [_clipped(vector, seed) for seed in range(3)]
    total = sum(np.concatenate(list(vector.pieces(each, 1, np.random.default_rng(9)))) for each in updates)
    for name, share in vector.shares(np.asarray(total), 3, 10).items():
        expected = sum(update[name] for update in updates) / 10
        assert np.abs(share - expected).max() <= 3 * 2 * vector.bounds[name] / 255 / 10


def test_a_rounding_that_is_too_long_is_drawn_again_and_an_update_that_stays_so_is_refused() -> None:
    vector = _within(1.0)
    update = _clipped(vector, 4)
    # Of this one about half of all roundings are within the norm.
    longer = {name: tensor * 1.025 for name, tensor in update.items()}
    free = replace(vector, norm=None)

    def lengths(of: SecureVector) -> list[float]:
        drawn = (np.concatenate(list(of.pieces(longer, 1, np.random.default_rng(seed)))) for seed in range(20))
        return [float(np.linalg.norm(2.0 * each[:-1] - 255)) * vector.bounds["a"] / 255 for each in drawn]

    assert max(lengths(vector)) <= 1.0 < max(lengths(free))
    with pytest.raises(EncodeError, match="norm"):
        list(vector.pieces({name: tensor * 1.2 for name, tensor in update.items()}, 1, np.random.default_rng(1)))


def test_sums_within_a_norm_have_one_bound_no_weights_and_a_norm_that_can_be() -> None:
    good = _within(1.0)
    for wrong in ({"norm": float("nan")}, {"norm": -1.0}, {"bounds": {"a": 1.0, "b": 2.0}}, {"weight_bits": 3}):
        with pytest.raises(UsageError):
            replace(good, **wrong)
    # Of a task that names absurd ones nothing overflows.
    absurd = replace(good, norm=1e300, bounds=dict.fromkeys(good.bounds, 1e-300))
    assert sum(each.size for each in absurd.pieces(_clipped(good, 1), 1, np.random.default_rng(1))) == good.size
    with pytest.raises(UpdateRefused, match="weights"):
        good.shares(np.zeros(good.size, np.uint64), 3, 3)

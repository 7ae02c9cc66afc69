"""Updates as vectors of integers, and back from their sum."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import ClassVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
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
    [
        {"bounds": {"a": 1.0}},
        {"bounds": {**VECTOR.bounds, "c": np.nan}},
        {"bounds": {**VECTOR.bounds, "c": 5e-324}},
        {"most_examples": 0},
        {"bits": 1},
    ],
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


class TestCoordinates:
    """A vector of a part of each large tensor: the same part on all devices."""

    SHAPES: ClassVar = {"w": (300, 400), "small": (31, 33), "b": (1040,)}

    def vector(self, seed: bytes = b"session", share: float = 0.25) -> SecureVector:
        bounds = dict.fromkeys(self.SHAPES, 1.0)
        return SecureVector(self.SHAPES, bounds, 8, 0, 5, coordinates=int(share * 2**32), seed=seed)

    def updates(self) -> list[dict[str, Array]]:
        rng = np.random.default_rng(1)
        return [{name: rng.uniform(-1, 1, shape) for name, shape in self.SHAPES.items()} for _ in range(5)]

    def test_their_sum_is_the_mean_where_it_has_values_and_says_nothing_elsewhere(self) -> None:
        vector, updates = self.vector(), self.updates()
        rng = np.random.default_rng(2)
        vectors = [np.concatenate(list(vector.pieces(update, 1, rng))) for update in updates]
        assert {each.size for each in vectors} == {vector.size}
        means = vector.means(np.sum(vectors, axis=0))
        for name, mean in means.items():
            there = ~np.isnan(mean)
            expected = np.mean([update[name] for update in updates], axis=0)
            assert np.abs(mean - expected)[there].max() <= 2 / 255 * (1 + 1e-9)
        # Five standard deviations of a quarter of so many.
        assert abs(np.isnan(means["w"]).mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 120_000)
        assert not np.isnan(means["small"]).any()
        assert 0.6 < np.isnan(means["b"]).mean() < 0.9

    def test_they_follow_from_seed_and_name_alone(self) -> None:
        def there(vector: SecureVector, name: str) -> Array:
            total = np.concatenate(list(vector.pieces(self.updates()[0], 1, np.random.default_rng(3))))
            return ~np.isnan(vector.means(total)[name]).reshape(-1)

        first = there(self.vector(), "w")
        assert np.array_equal(there(self.vector(), "w"), first)
        assert not np.array_equal(there(self.vector(b"another"), "w"), first)
        # Element i is in if word i of ChaCha20 is below the bound, as protos/WIRE.md has it.
        prefix = b"fedgrpc secure sum 1 coordinates"
        parts = (prefix, b"session", b"w")
        key = sha256(b"".join(len(part).to_bytes(4) + part for part in parts)).digest()
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * first.size))
        assert np.array_equal(np.frombuffer(stream, "<u4") < 2**30, first)

    def test_bounds_come_from_what_is_there_and_of_nothing_there_is_none(self) -> None:
        means = {"w": np.array([np.nan, -0.1, np.nan, 0.05]), "b": np.full(3, np.nan), "c": np.zeros(0)}
        assert bounds_after(means, 10.0) == pytest.approx({"w": 0.4, "c": 1e-5})

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.25, 0.9])
    @pytest.mark.parametrize("size", [200, 1024, 25_000, 300_000])
    def test_of_each_tensor_enough_are_left_to_tell_its_next_bound(self, share: float, size: int) -> None:
        rng = np.random.default_rng(1)
        vector = SecureVector({"w": (size,)}, {"w": 1.0}, 8, 0, 1, coordinates=int(share * 2**32), seed=b"session")
        left = vector.size - 1
        # Five standard deviations below 256.
        assert left == size or left > 256 - 5 * 16
        if share * size > 300:
            assert left < 1.5 * share * size or share > 0.6
        means = vector.means(np.concatenate(list(vector.pieces({"w": rng.normal(0, 0.1, size)}, 1, rng))))
        clipped = np.abs(rng.normal(0, 0.2, size)) > bounds_after(means, 100.0)["w"]
        assert clipped.mean() < 1e-3

    def test_they_do_not_go_with_a_norm(self) -> None:
        with pytest.raises(UsageError, match="coordinates"):
            replace(self.vector(), norm=1.0)

from __future__ import annotations

import numpy as np
import pytest

from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.rotated import Rotated, hadamard, random_signs, rotate


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def round_trip(encoding: Rotated, array: Array, seed: int = 0) -> Array:
    return encoding.decode(encoding.encode(array, rng(seed)), spec_of("x", array))


@pytest.mark.parametrize("exponent", [4, 7, 12])
def test_the_fast_rotation_is_the_naive_one_and_its_own_inverse(exponent: int) -> None:
    rows = rng().standard_normal((3, 1 << exponent)).astype(np.float32)
    naive = rows @ hadamard(exponent)
    np.testing.assert_allclose(rotate(rows), naive, atol=1e-4)
    np.testing.assert_allclose(rotate(rotate(rows)), rows, atol=1e-5)


def test_the_signs_are_splitmix64() -> None:
    # The first outputs for seed 1234567, as published with the reference implementation.
    words = [6457827717110365317, 3203168211198807973]
    bits = [(word >> i) & 1 for word in words for i in range(64)]
    np.testing.assert_array_equal(random_signs(1234567, 128), [1 - 2 * bit for bit in bits])


@pytest.mark.parametrize(("bits", "published"), [(1, 0.571), (2, 0.1331), (3, 0.0358), (4, 0.0096)])
@pytest.mark.parametrize("kind", ["gauss", "lognormal", "spike"])
def test_the_relative_error_is_the_theorys_whatever_the_values(bits: int, published: float, kind: str) -> None:
    size = 65536
    array = {
        "gauss": rng(1).standard_normal(size),
        "lognormal": rng(1).lognormal(0, 1, size),
        "spike": np.where(np.arange(size) % 300 == 7, 5.0, 0.01 * rng(1).standard_normal(size)),
    }[kind].astype(np.float32)
    decoded = round_trip(Rotated(bits), array)
    relative = ((decoded - array) ** 2).sum() / (array**2).sum()
    # A dozen spikes in a block are not yet normal once rotated.
    assert abs(relative / published - 1) < (0.4 if kind == "spike" else 0.08)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_it_is_unbiased_over_the_rotations(bits: int) -> None:
    array = rng(2).laplace(size=2048).astype(np.float32)
    repeats = 600
    total = sum(round_trip(Rotated(bits, 512), array, seed).astype(np.float64) for seed in range(repeats))
    error = total / repeats - array
    deviation = np.sqrt(0.571 * (array**2).mean() / repeats)
    assert np.sqrt((error**2).mean()) < 1.1 * deviation
    slope = (total / repeats * array).sum() / (array.astype(np.float64) ** 2).sum()
    assert abs(slope - 1) < 4 * np.sqrt(0.571 / repeats / array.size) + 1e-3


@pytest.mark.parametrize("size", [1, 15, 100, 4096, 4097, 40_000])
def test_any_size_is_padded_only_in_its_last_block(size: int) -> None:
    array = rng(3).standard_normal(size).astype(np.float32)
    encoding = Rotated(4)
    data = encoding.encode(array, rng())
    assert data.nbytes == encoding.size_bounds(spec_of("x", array))[0]
    decoded = encoding.decode(data, spec_of("x", array))
    assert ((decoded - array) ** 2).sum() < 0.05 * (array**2).sum()

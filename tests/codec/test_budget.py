from __future__ import annotations

import io

import numpy as np
import pytest

from fedgrpc.codec.budget import mixed_recipe, recipe_for_budget
from fedgrpc.codec.efficiency import measure, order0_bits
from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, layout_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.errors import EncodeError

ZSTD = Compression("zstd")


def update() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "conv[0].weight": rng.laplace(size=(64, 64, 3, 3)).astype(np.float32),
        "norm.weight": rng.laplace(size=128).astype(np.float32),
        "norm.count": np.array(3, np.int64),
        "fc.weight": rng.laplace(size=(512, 200)).astype(np.float32) * 1e-3,
        "fc.bias": rng.laplace(size=200).astype(np.float32),
    }


@pytest.mark.parametrize("budget_bytes", [8_000, 15_000, 40_000, 150_000])
def test_a_byte_budget_is_kept_and_used(budget_bytes: int) -> None:
    recipe = recipe_for_budget(update(), Recipe.parse("entropy+zstd"), budget_bytes, np.random.default_rng(1))
    manifest = write_payload(update(), recipe, io.BytesIO(), np.random.default_rng(2))
    assert 0.93 * budget_bytes < manifest.size_bytes < 1.01 * budget_bytes


def test_a_budget_below_the_coarsest_step_is_refused_with_both_numbers() -> None:
    with pytest.raises(EncodeError, match=r"\d+ bytes at the coarsest step, the budget is 1000"):
        recipe_for_budget(update(), Recipe.parse("entropy+zstd"), 1000, np.random.default_rng(1))


def test_a_mixed_recipe_sends_vectors_raw_and_the_last_layer_finer() -> None:
    layout = layout_of(update())
    recipe = mixed_recipe(layout, Entropy(5), parse_encoding("int8"), ZSTD)
    chosen = [str(recipe.for_tensor(spec)) for spec in layout]
    assert chosen == ["entropy:c=5", "raw:shuffle=yes", "raw", "int8", "raw:shuffle=yes"]
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("c", [2, 3, 5, 8])
def test_coarse_updates_are_within_four_percent_of_their_order_0_entropy(c: float) -> None:
    array = np.random.default_rng(3).laplace(size=1_000_000).astype(np.float32)
    found = measure(array, Entropy(c), ZSTD, np.random.default_rng(0))
    assert found.ratio < 1.04


def test_order_0_entropy_of_known_symbols() -> None:
    assert order0_bits(np.array([0, 1, 2, 3])) == 2
    assert order0_bits(np.array([7, 7, 7])) == 0
    assert order0_bits(np.array([])) == 0

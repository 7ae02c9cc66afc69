from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.budget import expected_bits, fit, measure, order0_bits
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, layout_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.codec.rounding import C_RANGE
from fedgrpc.errors import EncodeError, UsageError

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


def draws(seed: int = 2) -> np.random.Generator:
    return np.random.default_rng(seed)


def written(recipe: Recipe, tensors: dict[str, Array]) -> int:
    return write_payload(tensors, recipe, io.BytesIO(), draws()).size_bytes


@pytest.mark.parametrize("budget_bytes", [8_000, 15_000, 40_000, 150_000])
def test_a_byte_budget_is_kept_and_used(budget_bytes: int) -> None:
    fitted = fit(update(), Recipe.parse("entropy:c=0.01+zstd"), budget_bytes, draws)
    assert 0.93 * budget_bytes < fitted.size_bytes <= budget_bytes
    assert written(fitted.recipe, update()) == fitted.size_bytes
    assert not fitted.recipe.budget


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 20_000),
    heavy=st.booleans(),
    recipe=st.sampled_from(["entropy:budget=1+zstd", "entropy:c=0.5;@vectors=raw+zstd", "entropy:c=8"]),
    budget_bytes=st.integers(1, 100_000),
)
def test_a_payload_is_within_its_budget_or_the_smallest_there_is(
    seed: int, size: int, heavy: bool, recipe: str, budget_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, size=size) if heavy else rng.laplace(size=size)
    tensors = {"w": values.astype(np.float32).reshape(-1, 1), "b": values[: size // 9].astype(np.float32)}
    asked = Recipe.parse(recipe)
    fitted = fit(tensors, asked, budget_bytes, draws)
    assert written(fitted.recipe, tensors) == fitted.size_bytes
    assert isinstance(asked.default, Entropy)
    assert isinstance(fitted.recipe.default, Entropy)
    assert asked.default.c <= fitted.recipe.default.c <= C_RANGE[1]
    coarsest = replace(fitted.recipe, default=replace(fitted.recipe.default, c=C_RANGE[1]))
    if fitted.size_bytes > budget_bytes:
        assert fitted.recipe == coarsest


def test_a_budget_that_is_ample_changes_nothing() -> None:
    fitted = fit(update(), Recipe.parse("entropy:c=3,budget=1+zstd"), 1e9, draws)
    assert str(fitted.recipe) == "entropy+zstd"


def test_a_budget_that_cannot_be_kept_gets_the_coarsest_step() -> None:
    fitted = fit(update(), Recipe.parse("entropy+zstd"), 1000, draws)
    assert str(fitted.recipe) == "entropy:c=64.0+zstd"
    assert fitted.size_bytes > 1000


def test_only_a_step_can_be_fitted() -> None:
    with pytest.raises(EncodeError, match="int8 has no step to fit"):
        fit(update(), Recipe.parse("int8"), 1000, draws)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("entropy:budget=much", "allowed: a number of bytes, or link"),
        ("entropy:budget=-1", "allowed: a number of bytes, or link"),
        ("entropy:budget=100,distortion=0.5", "give one of them"),
        ("int8;head.*=entropy:budget=100", "a budget is for the whole payload"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Recipe.parse(text)


def test_a_recipe_sends_vectors_raw_and_the_last_layer_finer() -> None:
    layout = layout_of(update())
    recipe = Recipe.parse("entropy:c=5;@vectors=raw;@last=int8+zstd")
    assert Recipe.parse(str(recipe)) == recipe
    chosen = [str(recipe.for_layout(layout).for_tensor(spec)) for spec in layout]
    assert chosen == ["entropy:c=5.0", "raw:shuffle=yes", "raw", "int8", "raw:shuffle=yes"]
    # A name with characters that patterns know is that name and no other.
    first = recipe.for_layout(layout[:1])
    assert str(first.for_tensor(layout[0])) == "int8"
    assert str(first.for_tensor(replace(layout[0], name="conv0.weight"))) == "entropy:c=5.0"
    assert recipe.for_layout(()).overrides == recipe.overrides[:1]


@pytest.mark.parametrize("c", [2, 3, 5, 8])
def test_coarse_updates_are_within_four_percent_of_their_order_0_entropy(c: float) -> None:
    array = np.random.default_rng(3).laplace(size=1_000_000).astype(np.float32)
    found = measure(array, Entropy(c), ZSTD, np.random.default_rng(0))
    assert found.ratio < 1.04


def test_order_0_entropy_of_known_symbols() -> None:
    assert order0_bits(np.array([0, 1, 2, 3])) == 2
    assert order0_bits(np.array([7, 7, 7])) == 0
    assert order0_bits(np.array([])) == 0


@pytest.mark.parametrize(
    ("recipe", "least", "most"),
    [("raw", 32, 32.1), ("int8+zstd", 7.5, 8.5), ("int4", 4, 4.6), ("entropy:c=8+zstd", 0.01, 1)],
)
def test_what_updates_will_take_is_expected_by_their_recipe(recipe: str, least: float, most: float) -> None:
    assert least <= expected_bits(Recipe.parse(recipe), 1000) <= most


def test_a_budget_bounds_what_is_expected() -> None:
    assert expected_bits(Recipe.parse("entropy:budget=1000"), 16_000) == 0.5
    assert expected_bits(Recipe.parse("entropy:budget=link"), 16_000) > 1

from __future__ import annotations

import pytest

from fedgrpc.codec.encoding import ENCODING_NAMES, MAX_TEXT_CHARS, parse_encoding
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.errors import UsageError


@pytest.mark.parametrize(
    "text",
    ["raw", "int8+zstd", "int8+zstd:3", "bfloat16+zstd:-1", "int4:block=64;*.bias=raw;head.*=int8:block=128+zstd"],
)
def test_the_text_of_a_recipe_reads_back_as_the_same_recipe(text: str) -> None:
    assert str(Recipe.parse(text)) == text
    assert Recipe.parse(str(Recipe.parse(text))) == Recipe.parse(text)


def test_none_is_the_compression_that_is_left_out() -> None:
    assert str(Recipe.parse("int8+none")) == "int8"
    assert Recipe.parse("int8").compression == Compression("none")


@pytest.mark.parametrize(
    "text", ["int9", "int8+gzip", "int8+zstd:99", "int8;bias", "int8;=raw", "int8;x=int1", "int8;@first=raw"]
)
def test_bad_recipes_are_usage_errors_of_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


def test_the_first_pattern_that_fits_wins_and_tensors_that_cannot_gain_go_raw() -> None:
    recipe = Recipe.parse("int4;*.bias=raw;head.*=int8;head.weight=int2;*.half=float16")
    chosen = {
        spec.name: str(recipe.for_tensor(spec))
        for spec in (
            TensorSpec("conv.weight", "float32", (64,)),
            TensorSpec("conv.bias", "float32", (640,)),
            TensorSpec("head.weight", "float32", (640,)),
            TensorSpec("x.half", "float16", (640,)),
            TensorSpec("small", "float32", (63,)),
            TensorSpec("count", "int64", (640,)),
            TensorSpec("flags", "bool", (640,)),
        )
    }
    assert chosen == {
        "conv.weight": "int4",
        "conv.bias": "raw",
        "head.weight": "int8",
        "x.half": "raw",
        "small": "raw",
        "count": "raw",
        "flags": "raw",
    }


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("raw", "raw:shuffle=no+none"),
        ("int8+zstd", "int8:block=256,rounding=stochastic+zstd:1"),
        ("entropy+zstd:3", "entropy:c=3.0,rounding=stochastic+zstd:3"),
        ("entropy:distortion=0.5", "entropy:c=3.0,distortion=0.5,rounding=stochastic+none"),
        ("entropy:budget=link", "entropy:c=3.0,rounding=stochastic,budget=link+none"),
        (
            "rotated2;@last=topk;*.b=threshold",
            "rotated2:block=4096;@last=topk:fraction=0.01,bits=8;*.b=threshold:times=3.0,bits=8+none",
        ),
        ("bfloat16;a=float32", "bfloat16:shuffle=no;a=raw:shuffle=no+none"),
    ],
)
def test_the_full_text_names_every_key_and_means_the_same(text: str, full: str) -> None:
    assert Recipe.parse(text).full_text == full
    assert Recipe.parse(full) == Recipe.parse(text)


def test_the_full_text_of_the_longest_encoding_can_be_read() -> None:
    for name in ENCODING_NAMES:
        assert len(parse_encoding(name).text(full=True)) < MAX_TEXT_CHARS / 2

"""Which recipe two sides agree on: `RECIPE below RATE | RECIPE`, and what the other side lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.preference import Capabilities, parse_preferences
from fedgrpc.errors import UsageError

EVERYTHING = Capabilities.listed(["int8", "int4", "entropy", "float16"], ["zstd"])
BY_LINK = "entropy:c=8+zstd below 2mbit | int4+zstd below 20mbit | raw above 1gbit | int8+zstd"


@pytest.mark.parametrize(
    ("bits_per_second", "recipe"),
    [
        (None, "int8+zstd"),
        (1, "entropy:c=8.0+zstd"),
        (1_999_999, "entropy:c=8.0+zstd"),
        (2e6, "int4+zstd"),
        (20e6, "int8+zstd"),
        (1e9, "int8+zstd"),
        (1.1e9, "raw"),
    ],
)
def test_the_first_that_suits_the_link_is_chosen(bits_per_second: float | None, recipe: str) -> None:
    assert str(parse_preferences(BY_LINK).choose(EVERYTHING, bits_per_second)) == recipe


def test_what_is_not_listed_is_not_chosen() -> None:
    choose = parse_preferences(BY_LINK).choose
    without_entropy = Capabilities.listed(["int8", "int4"], ["zstd"])
    assert str(choose(without_entropy, 1e6)) == "int4+zstd"
    assert str(choose(Capabilities.listed(["int8"], ["zstd"]), 1e6)) == "int8+zstd"
    # Compression counts like encodings do.
    assert str(choose(Capabilities.listed(["int8", "int4", "entropy"], []), 1e6)) == "raw"
    assert parse_preferences("int8+zstd").choose(Capabilities.listed(["int8"], []), None) is None
    assert parse_preferences("int8;head.*=float16").choose(Capabilities.listed(["int8"], []), None) is None


def test_where_nothing_that_is_known_suits_the_link_the_last_that_is_known_serves() -> None:
    preferences = parse_preferences("entropy below 1mbit | int4 below 2mbit | int8")
    assert str(preferences.choose(Capabilities.listed(["entropy", "int4"], []), None)) == "int4"


def test_raw_is_known_to_everybody_and_names_that_nobody_knows_mean_nothing() -> None:
    known = Capabilities.listed(["uniform8", "telepathy", "", "int8:block=64"], ["zstd"])
    assert (known.encodings, str(known)) == ({"raw", "int8"}, "int8, raw, zstd")
    assert str(parse_preferences("float32").choose(Capabilities.listed([], []), None)) == "raw"


@given(
    st.floats(0, 1e12) | st.none(), st.sets(st.sampled_from(["int8", "int4", "entropy", "float16"])), st.booleans()
)
def test_whatever_is_chosen_is_known_and_there_is_something_if_anything_is_known(
    bits_per_second: float | None, names: set[str], zstd: bool
) -> None:
    known = Capabilities.listed(names, ["zstd"] if zstd else [])
    preferences = parse_preferences(BY_LINK)
    chosen = preferences.choose(known, bits_per_second)
    assert (chosen is not None) == any(map(known.covers, preferences.recipes))
    assert chosen is None or known.covers(chosen)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "0 alternatives"),
        ("raw|" * 7, "7 alternatives"),
        ("int8 below", "must look like"),
        ("int8 below fast", "must look like"),
        ("int8 under 2mbit", "must look like"),
        ("int8 below 2mbit or so", "must look like"),
        ("int8 below 2mbit", "a link of unknown speed"),
        ("telepathy | raw", "unknown encoding 'telepathy'"),
    ],
)
def test_preferences_that_cannot_be_are_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        parse_preferences(text)
    assert "\n" not in str(caught.value)

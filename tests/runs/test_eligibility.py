"""Eligibility: which devices an expression is true of, and where a wrong one is wrong."""

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.runs.eligibility import FACTS, MOST_CHARS, FactKind, eligible, parse

PI = {
    "name": "pi-7",
    "device_class": "raspberry-pi-4",
    "memory": 4e9,
    "cpu_cores": 4.0,
    "accelerator": "cpu",
    "on_mains": True,
    "load": 0.1,
    "label.site": "north",
    "local_minute": 23 * 60,
    "utc_minute": 12 * 60,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("  ", True),
        ('accelerator == "cuda"', False),
        ('accelerator != "cuda" and memory >= 2GB', True),
        ("memory >= 4GiB", False),
        ('label.site == "north" and on_mains and 22:00-06:00 local', True),
        ("22:00-06:00 utc", False),
        ("06:00-22:00 local", False),
        ("23:00-23:00 local", True),
        ("load < 50%", True),
        ("not on_mains or cpu_cores > 2", True),
        ("not (on_mains or cpu_cores > 2)", False),
        # "and" binds more closely than "or".
        ("on_mains or on_mains and cpu_cores > 100", True),
    ],
)
def test_an_expression_is_true_of_a_device_or_not(text, expected):
    assert eligible(parse(text), PI) is expected


@pytest.mark.parametrize(
    "text", ["temperature < 70", "not temperature < 70", 'label.rack == "a"', 'label.rack != "a"', "not idle"]
)
def test_nobody_is_eligible_by_what_is_not_known(text):
    assert not eligible(parse(text), PI)


def test_what_is_not_known_does_not_matter_where_the_rest_decides():
    assert eligible(parse("temperature < 70 or on_mains"), PI)
    assert parse("temperature < 70 and not on_mains").holds(PI) is False


@pytest.mark.parametrize(
    ("text", "column", "word"),
    [
        ("memroy >= 2GB", 1, "no such fact"),
        ("on_mains and", 13, "expected a fact"),
        ("memory >= 2lb", 11, "a size"),
        ("memory >= 2mbit", 11, "a size"),
        ('memory == "2GB"', 11, "a size"),
        ("accelerator == 3", 16, "text"),
        ('accelerator < "cuda"', 13, "only =="),
        ("(on_mains", 10, "expected ')'"),
        ("on_mains)", 9, "expected 'and'"),
        ("on_mains on_mains", 10, "expected 'and'"),
        ("25:00-06:00 local", 1, "a time"),
        ("22:00-06:00", 12, "local"),
        ("22:00", 6, "range"),
        ("load < 1; import os", 9, "no meaning"),
        ("__import__('os')", 12, "no meaning"),
        ("exec(on_mains)", 1, "no such fact"),
        ("not " * 40 + "on_mains", 129, "within each other"),
    ],
)
def test_an_error_names_the_column(text, column, word):
    with pytest.raises(UsageError, match=rf"column {column}\b.*{re.escape(word)}"):
        parse(text)


def test_an_expression_is_bounded():
    with pytest.raises(UsageError, match="characters"):
        parse("on_mains or " * MOST_CHARS)


flags = st.sampled_from([name for name, kind in FACTS.items() if kind is FactKind.FLAG])
numbers = st.sampled_from([name for name, kind in FACTS.items() if kind in (FactKind.NUMBER, FactKind.SIZE)])
values = st.integers(0, 9)
signs = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
atoms = flags | st.tuples(numbers, signs, values).map(lambda each: " ".join(map(str, each)))
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        inner.map(lambda each: f"not {each}"),
        inner.map(lambda each: f"({each})"),
        st.lists(inner, min_size=2, max_size=3).map(" and ".join),
        st.lists(inner, min_size=2, max_size=3).map(" or ".join),
    ),
    max_leaves=8,
)
facts = st.fixed_dictionaries(
    {name: st.booleans() if kind is FactKind.FLAG else values.map(float) for name, kind in FACTS.items()}
)


@given(expressions, facts)
def test_expressions_mean_what_python_means_by_them(text, known):
    # Python has the same words and precedence: a deliberately dumb second reader.
    text = text[:MOST_CHARS] if len(text) <= MOST_CHARS else "on_mains"
    assert eligible(parse(text), known) is eval(text, {"__builtins__": {}}, dict(known))


@given(expressions, facts, st.sets(st.sampled_from(sorted(FACTS))))
def test_more_knowledge_never_takes_eligibility_away(text, known, hidden):
    expression = parse(text)
    less = {name: value for name, value in known.items() if name not in hidden}
    if (sure := expression.holds(less)) is not None:
        assert expression.holds(known) is sure


@given(st.text(max_size=60))
def test_any_text_is_an_expression_or_a_usage_error(text):
    with suppress(UsageError):
        parse(text).holds({})

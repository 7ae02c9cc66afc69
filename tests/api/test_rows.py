"""Rows of records as dicts and as tables of two libraries, which need not be there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest

from fedgrpc.api.rows import Rows
from fedgrpc.errors import ExtraMissing


@dataclass(frozen=True)
class Line:
    number: int
    metrics: MappingProxyType[str, float]
    tags: tuple[str, ...] = ()
    parts: Rows = field(default_factory=Rows)


ROWS = Rows(
    [
        Line(1, MappingProxyType({}), ("a", "b")),
        Line(2, MappingProxyType({"loss": 0.5, "accuracy": 0.9}), (), Rows([Line(3, MappingProxyType({}))])),
    ]
)


def test_a_mapping_becomes_columns_and_records_within_are_left_out() -> None:
    assert ROWS.to_dicts() == [
        {"number": 1, "tags": "a, b"},
        {"number": 2, "tags": "", "metrics.accuracy": 0.9, "metrics.loss": 0.5},
    ]
    assert ROWS[0].number == 1
    assert len(ROWS) == 2


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_missing_library_is_named_with_its_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExtraMissing, match=rf"fedgrpc\[{library}\]"):
        getattr(ROWS, f"to_{library}")()


@pytest.mark.extras
@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_rows_become_a_table(library: str) -> None:
    table = getattr(ROWS, f"to_{library}")()
    assert list(table.columns) == ["number", "tags", "metrics.accuracy", "metrics.loss"]
    assert table.shape == (2, 4)
    assert list(table["number"]) == [1, 2]
    assert list(table["metrics.loss"])[1] == 0.5

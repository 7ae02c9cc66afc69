"""Rows of records, as a tuple that also becomes a table of pandas or Polars."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedgrpc.errors import ExtraMissing

if TYPE_CHECKING:
    import pandas
    import polars

T = TypeVar("T")


class Rows(tuple[T, ...]):
    """Records in their order: a tuple of frozen dataclasses, one row of a table each.

    In tables a mapping becomes a column for each of its names, as `metrics.accuracy`, and records within a record
    are left out.
    """

    __slots__ = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one value by column for each row."""
        return [flat(row) for row in self]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame of pandas. Raises `UsageError` where pandas is not installed."""
        frame: pandas.DataFrame = _library("pandas", "to_pandas()").DataFrame(self.to_dicts())
        return frame

    def to_polars(self) -> polars.DataFrame:
        """Return a DataFrame of Polars. Raises `UsageError` where Polars is not installed."""
        # A column may be empty in all of its first rows, by which Polars would choose its type.
        library = _library("polars", "to_polars()")
        frame: polars.DataFrame = library.DataFrame(self.to_dicts(), infer_schema_length=None)
        return frame


def flat(row: Any) -> dict[str, Any]:
    """Return one value by column for a record."""
    if hasattr(row, "to_dict"):
        values: dict[str, Any] = row.to_dict()
        return values
    columns: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Mapping):
            columns |= {f"{field.name}.{name}": value[name] for name in sorted(value)}
        elif not _has_records(value):
            columns[field.name] = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    return columns


def _has_records(value: Any) -> bool:
    return isinstance(value, Rows) or is_dataclass(value)


def _library(name: str, feature: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExtraMissing.of(feature, name, error) from None

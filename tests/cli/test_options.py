"""Declarations of settings: what a setting takes from its dataclass, and how values are picked for it."""

from dataclasses import dataclass
from typing import Literal

import click
import pytest

from fedgrpc.cli.options import Declare, pick
from fedgrpc.cli.values import DURATION
from fedgrpc.errors import UsageError


@dataclass(frozen=True)
class Oven:
    heat: float = 180.0
    mode: Literal["fan", "grill"] = "fan"
    trays: int | None = None

    def __post_init__(self) -> None:
        if self.heat < 0:
            raise UsageError(f"heat must be at least 0, not {self.heat:g}")


_declare = Declare("Baking", Oven)


def test_a_setting_takes_default_and_type_from_its_field():
    heat, mode, trays = _declare("--heat", "..."), _declare("--mode", "..."), _declare("--trays", "...")
    assert (heat.default, heat.type) == (180.0, click.FLOAT)
    assert isinstance(mode.type, click.Choice)
    assert tuple(mode.type.choices) == ("fan", "grill")
    assert (trays.default, trays.type) == (None, click.INT)


def test_a_setting_may_have_another_name_than_its_field():
    setting = _declare("--temperature", "...", name="heat")
    assert (setting.name, setting.key) == ("heat", "temperature")


def test_only_fields_are_picked_and_the_dataclass_checks_them():
    assert pick(Oven, {"heat": 200.0, "port": 1}, trays=2) == Oven(200.0, trays=2)
    with pytest.raises(UsageError, match="heat"):
        pick(Oven, {"heat": -1.0})


def test_a_quantity_of_many_digits_is_refused_at_once():
    # The pattern would take minutes.
    with pytest.raises(click.BadParameter, match="must look like"):
        DURATION.convert("1" * 50_000 + "!", None, None)

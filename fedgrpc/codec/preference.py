"""Preferences: several recipes, of which two sides agree on one that both know and that suits the link.

    int8+zstd                                                       this one, or nothing
    entropy:c=8+zstd below 2mbit | raw above 1gbit | int8+zstd | raw

The rule: take the first alternative that the other side knows and whose condition holds, else the last one that it
knows. No condition holds for a link that was never measured. A side knows what it lists, and raw without
compression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.recipe import MAX_RECIPE_CHARS, Recipe
from fedgrpc.errors import UsageError

MAX_ALTERNATIVES = 6
_RATE = re.compile(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)")
_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Capabilities:
    """Names of the encodings and compressions that a side can read and write."""

    encodings: frozenset[str]
    compressions: frozenset[str]

    @classmethod
    def listed(cls, encodings: Iterable[str], compressions: Iterable[str]) -> Capabilities:
        """Return the capabilities that a side lists. Aliases of an encoding count, unknown names do not."""
        names = {_own_name(name) for name in encodings}
        return cls(frozenset(name for name in names if name) | {"raw"}, frozenset(compressions) | {"none"})

    def covers(self, recipe: Recipe) -> bool:
        """Return whether the side knows everything that the recipe names."""
        return recipe.names <= self.encodings and recipe.compression.method in self.compressions

    def __str__(self) -> str:
        return ", ".join(sorted(self.encodings) + sorted(self.compressions - {"none"}))


@dataclass(frozen=True)
class Alternative:
    """A recipe, and the links it is for: `below` or `above` that many bits a second; None: all."""

    recipe: Recipe
    below: float | None = None
    above: float | None = None

    @staticmethod
    def parse(text: str) -> Alternative:
        """Read `RECIPE`, `RECIPE below RATE` or `RECIPE above RATE`. Raises UsageError."""
        recipe, *condition = text.split()
        if not condition:
            return Alternative(Recipe.parse(recipe))
        rate = _RATE.fullmatch(condition[-1])
        if len(condition) != 2 or condition[0] not in ("below", "above") or rate is None:
            raise UsageError(
                f"{text.strip()!r} must look like int8+zstd, or int4+zstd below 2mbit, or raw above 1gbit"
            )
        bits_per_second = float(rate[1]) * _UNITS[rate[2]]
        return Alternative(Recipe.parse(recipe), **{condition[0]: bits_per_second})

    def suits(self, bits_per_second: float | None) -> bool:
        """Return whether the recipe is for a link of this speed; None: unknown."""
        if self.below is None and self.above is None:
            return True
        if bits_per_second is None:
            return False
        return bits_per_second < self.below if self.below is not None else bits_per_second > (self.above or 0.0)


@dataclass(frozen=True)
class Preferences:
    """Alternatives, most wanted first."""

    alternatives: tuple[Alternative, ...]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes of all alternatives, each once."""
        return tuple(dict.fromkeys(alternative.recipe for alternative in self.alternatives))

    def choose(self, known: Capabilities, bits_per_second: float | None) -> Recipe | None:
        """Return the recipe for a side over a link of that speed; None: the side knows none of them."""
        usable = [alternative for alternative in self.alternatives if known.covers(alternative.recipe)]
        suited = [alternative for alternative in usable if alternative.suits(bits_per_second)]
        return next((alternative.recipe for alternative in suited or usable[-1:]), None)


@lru_cache(maxsize=64)
def parse_preferences(text: str) -> Preferences:
    """Read alternatives separated by "|". Raises UsageError in one line."""
    if len(text) > MAX_ALTERNATIVES * MAX_RECIPE_CHARS:
        raise UsageError(f"alternatives of {len(text)} characters; each recipe has at most {MAX_RECIPE_CHARS}")
    parts = [part for part in text.split("|") if part.strip()]
    if not 1 <= len(parts) <= MAX_ALTERNATIVES:
        raise UsageError(f"{len(parts)} alternatives of recipes; allowed: 1 to {MAX_ALTERNATIVES}")
    alternatives = tuple(Alternative.parse(part) for part in parts)
    if not any(alternative.suits(None) for alternative in alternatives):
        raise UsageError(f"{text!r} has no recipe for a link of unknown speed: add one without below or above")
    return Preferences(alternatives)


def _own_name(name: str) -> str:
    """Return the canonical name, such as "int8" for "uniform8"; empty for an unknown name."""
    try:
        return str(parse_encoding(name)).partition(":")[0]
    except UsageError:
        return ""

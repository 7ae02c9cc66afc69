"""Selectors: rules of an operator's own that choose the workers of a round (`--selection`).

    uniform   oort   package.module:Class:option=1

The rule: what a selector raises or returns amiss costs its choice, never the round. Workers are then drawn by lot,
and the reason of each choice says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.plugins import make
from fedgrpc.rounds.history import Histories

UNIFORM: Final = "uniform"
OORT: Final = "oort"
SELECTIONS: Final[Mapping[str, Any]] = {UNIFORM: None, OORT: None}
_MOST_CHARS: Final = 200


class Selector(Protocol):
    """A frozen dataclass, whose fields are its options. It is called in a thread, and knows no clock."""

    def choose(
        self, idle: Sequence[str], count: int, histories: Histories, round_number: int, rng: np.random.Generator
    ) -> Sequence[str]:
        """Return up to `count` different names of `idle`.

        `histories` has a `WorkerHistory` of each: times of its last tasks, loss, examples, when it was selected.
        Chance comes from `rng` alone, so that a round can be played again.
        """
        ...


@lru_cache(maxsize=64)
def selector_of(text: str) -> Selector | None:
    """Return the selector of a text; None for the built-in ones. Raises `UsageError`."""
    if text in SELECTIONS:
        return None
    made = make("selection", text, {})
    if not callable(getattr(made, "choose", None)):
        raise UsageError(f"selection {text}: the class has no choose()")
    selector: Selector = made
    return selector


def chosen_by(
    selector: Selector,
    idle: tuple[str, ...],
    count: int,
    histories: Histories,
    round_number: int,
    rng: np.random.Generator,
) -> tuple[tuple[str, ...], str]:
    """Return what a selector chooses, and "" or what is wrong with that."""
    try:
        chosen = tuple(selector.choose(tuple(idle), count, histories, round_number, rng))
    # Code of others may raise anything, which must not end the run.
    except Exception as error:  # noqa: BLE001
        return (), f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MOST_CHARS]
    if not set(chosen) <= set(idle):
        return (), "it chose a worker that is not idle"
    if len(set(chosen)) < len(chosen) or len(chosen) > count:
        return (), f"it chose {len(chosen)} workers, and may choose {count} different ones"
    return chosen, ""

"""How many bytes an update may take, and the step of its encoding that keeps to it.

    entropy:budget=150000    so many
    entropy:budget=link      what goes through this worker's link in the time left: rate * seconds * 0.8

The rule: a budget makes an update coarser, and never stops it. One that cannot be kept is sent at the coarsest
step, and the log says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import structlog

from fedgrpc.codec.budget import fit
from fedgrpc.codec.entropy import LINK, Entropy
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.recipe import Recipe
from fedgrpc.worker.task import Task

# Of what would go through: the rest is for encoding, syncing and a link that is slower this time.
_SHARE: Final = 0.8

log = structlog.get_logger()


def budget_bytes(budget: str, task: Task, now_s: float) -> float | None:
    """What the payload may take; None: no bound is known. `now_s` is of the monotonic clock."""
    if budget != LINK:
        return float(budget)
    if task.deadline_s is None or not task.uplink_bytes_per_second:
        return None
    return _SHARE * task.uplink_bytes_per_second * max(0.0, task.deadline_s - now_s)


def fitted(
    recipe: Recipe,
    tensors: Mapping[str, Array],
    known: Layout,
    task: Task,
    draw: Callable[[], np.random.Generator],
) -> Recipe:
    """`recipe` with the step that its budget asks for, as fine as fits; unchanged without a budget.

    `tensors` are what will be encoded, `known` as in `layout_of`, with the random numbers that `draw` gives.
    """
    if not recipe.budget:
        return recipe
    most_bytes = budget_bytes(recipe.budget, task, time.monotonic())
    if most_bytes is None:
        reason = "a deadline or the rate of this link is not known"
        log.info("update without a budget", round=task.round, reason=reason)
        return recipe.without_budget()
    found = fit(tensors, recipe, most_bytes, draw, known)
    assert isinstance(found.recipe.default, Entropy)
    about = {"round": task.round, "c": found.recipe.default.c, "bytes": found.size_bytes}
    if found.size_bytes > most_bytes:
        log.warning("update over its budget", **about, budget_bytes=int(most_bytes))
    else:
        log.info("update fitted to its budget", **about, budget_bytes=int(most_bytes))
    return found.recipe

"""Sweeps: one experiment with many settings and seeds, each a simulation of its own, several at a time.

    FOLDER/points/0003-seed-1/    one simulation (fedgrpc.simulation.learning.run), versions.json once it is done

The rule: a point that is done is not played again. So a sweep that was cut off goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fedgrpc import toml
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.simulation.learning.engine import InProcess
from fedgrpc.simulation.learning.experiment import Experiment
from fedgrpc.simulation.learning.pool import leave_to_parent
from fedgrpc.simulation.learning.run import LearningRun
from fedgrpc.simulation.learning.versions import VersionRow, version_rows

MOST_POINTS: Final = 10_000
_DONE: Final = "versions.json"

# Builds an experiment from the content of its file.
ReadExperiment = Callable[[Mapping[str, Any]], Experiment]
# The settings that a point changes, by TABLE.KEY.
Changes = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """Which points of the grid are played: all, or `samples` of them by lot; each with every one of `seeds`."""

    experiment: str
    seeds: tuple[int, ...] = (0,)
    search: Literal["grid", "random"] = "grid"
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError("seeds of a sweep are one or more different numbers")
        if (self.search == "random") != (self.samples > 0):
            raise UsageError("samples go with search = 'random', and are at least 1")


@dataclass(frozen=True)
class Point:
    """One simulation of a sweep."""

    number: int
    seed: int
    changes: Changes
    experiment: Experiment = field(repr=False)

    @property
    def label(self) -> str:
        """The settings in short."""
        return (
            ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in self.changes.items()) or "as given"
        )

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.number:04d}-seed-{self.seed}"


def points_of(document: Mapping[str, Any], base: Mapping[str, Any], read: ReadExperiment) -> list[Point]:
    """Return the points of a grid file for an experiment's file. Raises `UsageError`, also for any bad point.

    The seed of a point is that of devices, of the aggregator, of the data's split and of the first model.
    """
    search, grid = search_of(document), document.get("grid", {})
    points = []
    for number, changes in enumerate(_chosen(search, list(_combinations(grid)))):
        for seed in search.seeds:
            changed = deepcopy(dict(base))
            for name, value in {**changes, "aggregator.seed": seed, "learning.seed": seed}.items():
                table, _, key = name.partition(".")
                changed.setdefault(table, {})[key] = value
            points.append(Point(number, seed, changes, read(changed)))
    if len(points) > MOST_POINTS:
        raise UsageError(f"a sweep of {len(points)} simulations; it may have {MOST_POINTS}: search = 'random'")
    return points


def search_of(document: Mapping[str, Any]) -> Search:
    """Return how the grid is searched. Raises `UsageError`."""
    return toml.read(Search, {name: value for name, value in document.items() if name != "grid"}, "the grid file")


def _combinations(grid: Any) -> Iterator[Changes]:
    if not isinstance(grid, Mapping) or not all(isinstance(table, Mapping) for table in grid.values()):
        raise UsageError("[grid.TABLE] has lists of values by setting, as in [grid.aggregator]")
    axes: dict[str, list[Any]] = {}
    for table, settings in grid.items():
        for key, values in settings.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"[grid.{table}] {key} is a list of values, not {values!r}")
            axes[f"{table}.{key}"] = values
    if math.prod(map(len, axes.values())) > 1_000_000:
        raise UsageError("the grid has more than a million points")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _chosen(search: Search, combinations: list[Changes]) -> list[Changes]:
    if search.search == "grid" or search.samples >= len(combinations):
        return combinations
    drawn = np.random.default_rng(search.seed).choice(len(combinations), search.samples, replace=False)
    return [combinations[index] for index in sorted(drawn)]


def play_points(
    points: Sequence[Point], folder: Path, jobs: int, show: Callable[[int], None] = lambda done: None
) -> dict[str, list[VersionRow]]:
    """Play what is not done yet, `jobs` at a time; return the versions of each point, by its folder's name.

    `show` hears how many are done. An error of one point ends all. Raises as `LearningRun`.
    """
    results = {point.folder: rows for point in points if (rows := _done(folder / "points" / point.folder))}
    waiting = [point for point in points if point.folder not in results]
    show(len(results))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, max(1, len(waiting))), context, leave_to_parent)
    try:
        running: dict[Future[list[VersionRow]], Point] = {
            pool.submit(_play, point, folder / "points" / point.folder): point for point in waiting
        }
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                results[running.pop(future).folder] = future.result()
                show(len(results))
    except BrokenProcessPool as error:
        raise FedgrpcError("a simulation has ended; was it killed for its memory?") from error
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
    return {point.folder: results[point.folder] for point in points}


def _done(folder: Path) -> list[VersionRow]:
    path = folder / _DONE
    return [VersionRow(**values) for values in json.loads(path.read_text())] if path.exists() else []


def _play(point: Point, folder: Path) -> list[VersionRow]:
    """Play one point in a process of its own."""
    engine = InProcess(point.experiment.learning, point.experiment.count)
    rows = version_rows(LearningRun(point.experiment, folder, engine, point.seed).run())
    unfinished = folder / f"{_DONE}.part"
    unfinished.write_text(json.dumps([vars(row) for row in rows], default=dict))
    unfinished.replace(folder / _DONE)
    return rows

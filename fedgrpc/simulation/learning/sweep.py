"""Sweeps: one experiment with many settings and seeds, each a simulation of its own, several at a time.

    FOLDER/points/0003-seed-1/    one simulation (fedgrpc.simulation.learning.run), and its `point_folder`

The rule: a point that is done is not played again. So a sweep that was cut off goes on where it was. With
`hours`, all points are scored at equal virtual hours: none has a version or a score of later.
"""

from __future__ import annotations

import itertools
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
from fedgrpc.simulation.learning.point_folder import PointFolder
from fedgrpc.simulation.learning.pool import leave_to_parent
from fedgrpc.simulation.learning.run import LearningRun
from fedgrpc.simulation.learning.versions import VersionRow, version_rows

MOST_POINTS: Final = 10_000
_AXES: Final = ("grid", "choices")

# Builds an experiment from the content of its file.
ReadExperiment = Callable[[Mapping[str, Any]], Experiment]
# The settings that a point changes, by TABLE.KEY.
Changes = dict[str, Any]
# Values of one axis, by the name that tables show: the settings that each changes.
Axis = dict[Any, Changes]
# The versions of each point, by the name of its folder.
Results = Mapping[str, Sequence[VersionRow]]


@dataclass(frozen=True)
class Search:
    """Points of the grid to play: all, or `samples` of them by lot; each with every one of `seeds`.

    A point is played until its run ends, or for so many virtual `hours`.
    """

    experiment: str
    hours: float | None = None
    seeds: tuple[int, ...] = (0,)
    search: Literal["grid", "random"] = "grid"
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError("seeds of a sweep are one or more different numbers")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise UsageError(f"hours of a sweep must be positive, not {self.hours:g}")
        if (self.search == "random") != (self.samples > 0):
            raise UsageError("samples go with search = 'random', and are at least 1")


@dataclass(frozen=True)
class Point:
    """One simulation of a sweep. `choices` has its value on each axis, as tables show it."""

    number: int
    seed: int
    choices: Mapping[str, Any]
    experiment: Experiment = field(repr=False)
    hours: float = math.inf

    @property
    def label(self) -> str:
        """The settings in short."""
        return (
            ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in self.choices.items()) or "as given"
        )

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.number:04d}-seed-{self.seed}"


def points_of(document: Mapping[str, Any], base: Mapping[str, Any], read: ReadExperiment) -> list[Point]:
    """Return the points of a grid file for an experiment's file. Raises `UsageError`, also for any bad point.

    The seed of a point is that of devices, of the aggregator, of the data's split and of the first model.
    """
    search, axes = search_of(document), axes_of(document)
    points = []
    for number, choices in enumerate(_chosen(search, list(_combinations(axes)))):
        changes = {name: value for axis, choice in choices.items() for name, value in axes[axis][choice].items()}
        for seed in search.seeds:
            changed = deepcopy(dict(base))
            for name, value in {**changes, "aggregator.seed": seed, "learning.seed": seed}.items():
                table, _, key = name.partition(".")
                changed.setdefault(table, {})[key] = value
            points.append(Point(number, seed, choices, read(changed), search.hours or math.inf))
    if len(points) > MOST_POINTS:
        raise UsageError(f"a sweep of {len(points)} simulations; it may have {MOST_POINTS}: search = 'random'")
    return points


def search_of(document: Mapping[str, Any]) -> Search:
    """Return how the grid is searched. Raises `UsageError`."""
    others = {name: value for name, value in document.items() if name not in _AXES}
    return toml.read(Search, others, "the grid file")


def axes_of(document: Mapping[str, Any]) -> dict[str, Axis]:
    """Return the axes of a grid file: `[grid.TABLE] key = [values]`, and `[choices.NAME.VALUE.TABLE] key = value`.

    A choice changes several settings at once. Raises `UsageError`.
    """
    axes: dict[str, Axis] = {}
    for table, settings in _tables(document.get("grid", {}), "[grid.TABLE]"):
        for key, values in settings.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"[grid.{table}] {key} is a list of values, not {values!r}")
            name = f"{table}.{key}"
            axes[name] = {_shown(value): {name: value} for value in values}
    for axis, choices in _tables(document.get("choices", {}), "[choices.NAME.VALUE.TABLE]"):
        if axis in axes or not choices:
            raise UsageError(f"[choices.{axis}] needs choices, and a name of its own")
        axes[axis] = {
            choice: {
                f"{table}.{key}": value
                for table, settings in _tables(tables, f"[choices.{axis}.{choice}.TABLE]")
                for key, value in settings.items()
            }
            for choice, tables in choices.items()
        }
    changed = [name for axis in axes.values() for name in {name for changes in axis.values() for name in changes}]
    if twice := {name for name in changed if changed.count(name) > 1}:
        raise UsageError(f"two axes of the grid change {min(twice)}")
    return axes


def _tables(found: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(found, Mapping) or not all(isinstance(table, Mapping) for table in found.values()):
        raise UsageError(f"a grid file has tables {where}")
    return iter(found.items())


def _shown(value: Any) -> Any:
    # Names of an axis are keys: of what is none, the text.
    return value if isinstance(value, str | int | float | bool) else str(value)


def _combinations(axes: Mapping[str, Axis]) -> Iterator[dict[str, Any]]:
    if math.prod(map(len, axes.values())) > 1_000_000:
        raise UsageError("the grid has more than a million points")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _chosen(search: Search, combinations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if search.search == "grid" or search.samples >= len(combinations):
        return combinations
    drawn = np.random.default_rng(search.seed).choice(len(combinations), search.samples, replace=False)
    return [combinations[index] for index in sorted(drawn)]


def play_points(
    points: Sequence[Point], folder: Path, jobs: int, show: Callable[[int], None] = lambda done: None
) -> dict[str, list[VersionRow]]:
    """Play what is not done yet, `jobs` at a time; return the versions of each point, by its folder's name.

    `show` hears how many are done. An error of one point ends all. Raises as `LearningRun`, and `UsageError` for a
    folder of other settings.
    """
    results = {point.folder: rows for point in points if (rows := _folder(point, folder).versions())}
    waiting = [point for point in points if point.folder not in results]
    show(len(results))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, max(1, len(waiting))), context, leave_to_parent)
    try:
        running: dict[Future[list[VersionRow]], Point] = {
            pool.submit(_play, point, _folder(point, folder)): point for point in waiting
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


def tidy_rows(points: Sequence[Point], results: Results) -> list[dict[str, Any]]:
    """Return one row for each version of each point, with the settings of the point in columns of their own."""
    return [
        {"point": point.number, "seed": point.seed, **point.choices, **row.to_dict()}
        for point in points
        for row in results[point.folder]
    ]


def _folder(point: Point, folder: Path) -> PointFolder:
    return PointFolder(folder / "points" / point.folder, point.experiment.document, point.hours)


def _play(point: Point, folder: PointFolder) -> list[VersionRow]:
    """Play one point in a process of its own."""
    folder.begin()
    engine = InProcess(point.experiment.learning, point.experiment.count)
    rows = version_rows(LearningRun(point.experiment, folder.path, engine, point.seed).run(point.hours))
    folder.finish(rows)
    return rows

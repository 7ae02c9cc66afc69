"""Simulations within a program: those of `fedgrpc simulate` and `fedgrpc sweep`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from fedgrpc import toml
from fedgrpc.api.block import log_quietly
from fedgrpc.api.rows import Rows
from fedgrpc.cli.experiment import parse_experiment
from fedgrpc.cli.values import read_file
from fedgrpc.simulation.learning.play import IN_USE, play
from fedgrpc.simulation.learning.sweep import play_points, points_of, search_of, tidy_rows
from fedgrpc.simulation.learning.versions import VersionRow
from fedgrpc.storage.folder import hold_folder

T = TypeVar("T")
# The path of a TOML file, or what one would hold.
Document = str | PathLike[str] | Mapping[str, Any]


class SweepRow(dict[str, Any]):
    """One version of one point of a sweep: by column, its settings, its seed and all of a `VersionRow`."""

    def to_dict(self) -> dict[str, Any]:
        """Return one value by column."""
        return dict(self)


def simulate(
    experiment: Document,
    out: str | PathLike[str] | None = None,
    *,
    seed: int = 0,
    jobs: int = 1,
    engine: str = "auto",
    hours: float | None = None,
    resume: bool = False,
) -> Rows[VersionRow]:
    """Play an experiment (docs/guide/research.md), and return its versions, oldest first.

    `experiment` is a TOML file or its content. `out` keeps all that the simulation makes; None: nothing is kept.
    `jobs` processes train; `hours` are virtual, None: until the run ends. The same seed gives the same versions.
    Raises `UsageError` for an experiment that cannot be.
    """
    found = parse_experiment(_content(experiment))
    log_quietly()

    def played(folder: Path) -> Rows[VersionRow]:
        given: dict[str, Any] = {"seed": seed, "jobs": jobs, "engine": engine, "hours": hours, "resume": resume}
        return Rows(play(found, folder, **given))

    return _kept(out, played)


def sweep(
    grid: Document,
    out: str | PathLike[str] | None = None,
    *,
    jobs: int = 2,
    experiment: Document | None = None,
) -> Rows[SweepRow]:
    """Play an experiment with many settings and seeds, and return the versions of all of them.

    `grid` is a TOML file or its content (docs/guide/research.md). `experiment`, a file or content, is in place of
    the one that the grid names. What is done in the folder `out` is not played again. Raises as `simulate`.
    """
    document = _content(grid)
    if experiment is None:
        beside = Path() if isinstance(grid, Mapping) else Path(grid).parent
        experiment = beside / search_of(document).experiment
    points = points_of(document, _content(experiment), parse_experiment)
    log_quietly()

    def played(folder: Path) -> Rows[SweepRow]:
        with hold_folder(folder, IN_USE):
            return Rows(map(SweepRow, tidy_rows(points, play_points(points, folder, jobs))))

    return _kept(out, played)


def _content(document: Document) -> Mapping[str, Any]:
    if isinstance(document, Mapping):
        return document
    return read_file(Path(document), toml.parse)


def _kept(out: str | PathLike[str] | None, played: Callable[[Path], T]) -> T:
    """Call `played` with a folder, which goes with the call unless it is named."""
    if out is not None:
        return _beside_loop(lambda: played(Path(out)))
    with tempfile.TemporaryDirectory(prefix="fedgrpc-simulation-") as folder:
        return _beside_loop(lambda: played(Path(folder)))


def _beside_loop(call: Callable[[], T]) -> T:
    """Make a call that has an event loop of its own, in another thread where one runs here, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()

"""`fedgrpc sweep GRID.toml`: one experiment with many settings and seeds, as one table and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from fedgrpc import toml
from fedgrpc.cli.experiment import parse_experiment
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.values import read_file
from fedgrpc.cli.view import piped_console, print_table, progress_bar, told_when_stopped
from fedgrpc.logging import configure
from fedgrpc.simulation.learning.play import IN_USE, as_csv, columns_of
from fedgrpc.simulation.learning.plots import Curve, check_plot, pareto_front, plot_curves
from fedgrpc.simulation.learning.sweep import Point, Results, play_points, points_of, search_of, tidy_rows
from fedgrpc.simulation.learning.versions import VersionRow
from fedgrpc.storage.folder import hold_folder
from fedgrpc.words import seconds, size

_TABLE: Final = "sweep.csv"
_PARQUET: Final = "sweep.parquet"


def _run(**values: Any) -> None:
    path: Path = values["grid"]
    out = values["out"] or Path(f"{path.stem}-sweep")
    if (plot := values["plot"]) is not None:
        check_plot(plot)
    document = read_file(path, toml.parse)
    base = path.parent / search_of(document).experiment
    content = read_file(base, toml.parse)
    points = read_file(path, lambda text: points_of(toml.parse(text), content, parse_experiment))
    configure("error")
    with (
        told_when_stopped("the same command plays what is not done"),
        hold_folder(out, IN_USE),
        progress_bar(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress,
    ):
        shown = progress.add_task("", total=len(points))
        results = play_points(points, out, values["jobs"], lambda done: progress.update(shown, completed=done))
    rows = tidy_rows(points, results)
    (out / _TABLE).write_text(as_csv(rows))
    written = [_TABLE, *([_PARQUET] if _write_parquet(rows, out / _PARQUET) else [])]
    if plot is not None:
        plot_curves(curves_of(points, results), plot)
    console = piped_console()
    print_table(console, summary(points, results))
    for name in written:
        console.print(f"{out / name}: all versions of all points", highlight=False, markup=False)
    if plot is not None:
        console.print(f"plot: {plot}", highlight=False, markup=False)


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Write the table for programs as well; return whether pyarrow is there to do so."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return False
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns_of(rows)}), path)
    return True


def _grouped(points: Sequence[Point], results: Results) -> dict[int, tuple[str, list[Sequence[VersionRow]]]]:
    """Return the runs of each setting, one for each seed, by the number of the setting."""
    found: dict[int, tuple[str, list[Sequence[VersionRow]]]] = {}
    for point in points:
        found.setdefault(point.number, (point.label, []))[1].append(results[point.folder])
    return found


def curves_of(points: Sequence[Point], results: Results) -> list[Curve]:
    """Return a curve for each setting."""
    return [Curve(label, tuple(runs)) for label, runs in _grouped(points, results).values()]


def summary(points: Sequence[Point], results: Results) -> Table:
    """Return a row for each setting, best score first: score, cost, and whether others beat it in both."""
    lines = []
    for label, runs in _grouped(points, results).values():
        ends = [run[-1] for run in runs]
        scores = [score for run in runs if (score := _last_score(run)) is not None]
        cost = float(np.mean([end.down_bytes + end.up_bytes for end in ends]))
        hours = float(np.mean([end.virtual_h for end in ends]))
        lines.append((label, scores, cost, hours, float(np.mean([end.wasted_share for end in ends]))))
    means = [float(np.mean(scores)) if scores else float("nan") for _, scores, *_ in lines]
    front = set(pareto_front([(line[2], mean) for line, mean in zip(lines, means, strict=True)]))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting")
    for heading in ("score", "±", "bytes", "virtual\ntime", "wasted", "front"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index in sorted(range(len(lines)), key=lambda each: -np.nan_to_num(means[each], nan=-np.inf)):
        label, scores, cost, hours, wasted = lines[index]
        spread = f"{np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
        mark = "*" if index in front else ""
        table.add_row(
            label, f"{means[index]:.4f}", spread, size(cost), seconds(hours * 3600), f"{wasted:.1%}", mark
        )
    return table


def _last_score(run: Sequence[VersionRow]) -> float | None:
    return next((row.score for row in reversed(run) if row.score is not None), None)


_sweep = Declare("Sweep")
_show = Declare("What to show")

SETTINGS: list[click.Parameter] = [
    click.Argument(["grid"], type=click.Path(path_type=Path, dir_okay=False)),
    _sweep(
        "--out",
        "Folder of all simulations; those that are done in it are not played again.",
        type=click.Path(path_type=Path, file_okay=False),
        show_default="GRID-sweep",
    ),
    _sweep("--jobs", "Simulations at the same time.", type=click.IntRange(1), default=2),
    _show("--plot", "Write a plot to this file.", type=click.Path(path_type=Path)),
]

COMMAND = SettingsCommand(
    "sweep", _run, SETTINGS, "Simulate an experiment with many settings and seeds, and compare them."
)

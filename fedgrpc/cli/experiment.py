"""`fedgrpc simulate EXPERIMENT.toml`: a simulation that learns, from its file to its table.

The rule: the folder of a simulation holds all that it has made, at every moment. So Ctrl-C may end it at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedgrpc import toml
from fedgrpc.cli.aggregator import COMMAND as AGGREGATOR
from fedgrpc.cli.aggregator import settings_from
from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.values import read_file
from fedgrpc.cli.view import piped_console, print_table, progress_bar, told_when_stopped
from fedgrpc.errors import UsageError
from fedgrpc.logging import configure
from fedgrpc.simulation.learning.experiment import Experiment
from fedgrpc.simulation.learning.history import RoundRow
from fedgrpc.simulation.learning.play import VERSIONS, play
from fedgrpc.simulation.learning.plots import Curve, check_plot, plot_curves
from fedgrpc.simulation.learning.versions import VersionRow
from fedgrpc.words import seconds, size

# Of more versions, the table on the terminal shows some.
_SHOWN: Final = 20


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from a TOML file. Raises `UsageError`."""
    return read_file(path, lambda text: parse_experiment(toml.parse(text)))


def parse_experiment(document: Mapping[str, Any]) -> Experiment:
    """Read an experiment from the content of its file. Raises `UsageError`."""
    return Experiment.parse(document, lambda table: settings_from(_values(table)))


def _values(table: Mapping[str, Any]) -> dict[str, Any]:
    # Each simulation has a folder of its own.
    if "data_dir" in table or "data-dir" in table:
        raise UsageError("[aggregator] of an experiment has no data_dir: --out names the folder")
    return AGGREGATOR.values_of(table, {"data_dir": Path()})


def simulate_experiment(path: Path, values: Mapping[str, Any]) -> None:
    """Play an experiment with the settings of `fedgrpc simulate`. Raises `UsageError`, as the parts do."""
    experiment = read_experiment(path)
    out = values["out"] or Path(f"{path.stem}-simulated")
    plot = values["plot"]
    if plot is not None:
        check_plot(plot)
    # What the aggregator and its workers would log is in the folder, too.
    configure("error")
    with told_when_stopped("the same command with --resume goes on"), _progress() as progress:
        shown = progress.add_task("", total=1.0, told="")

        def show(row: RoundRow, part: float) -> None:
            told = f"version {row.version}, {seconds(row.virtual_s)} of virtual time"
            progress.update(shown, completed=part, told=told)

        given = {name: values[name] for name in ("seed", "jobs", "engine", "hours", "resume")}
        rows = play(experiment, out, **given, show=show)
    if plot is not None:
        plot_curves([Curve(path.stem, (rows,))], plot)
    if values["as_json"]:
        click.echo(json_text([row.to_dict() for row in rows]))
        return
    console = piped_console()
    print_table(console, _table(experiment, rows))
    console.print(f"{out / VERSIONS}: all versions", highlight=False, markup=False)
    if plot is not None:
        console.print(f"plot: {plot}", highlight=False, markup=False)


def _progress() -> Progress:
    percent, told = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[told]}")
    return progress_bar(BarColumn(), percent, TimeElapsedColumn(), told)


def _table(experiment: Experiment, rows: list[VersionRow]) -> Table:
    """Return a table of the versions; of many, some evenly spaced and the last."""
    table = Table(
        title=f"{experiment.count} devices, {experiment.learning.task}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    names = sorted({name for row in rows for name in row.scores})
    for heading in ("version", "virtual\ntime", "round", "updates", "down", "up", "wasted", "train\nloss", *names):
        table.add_column(heading, justify="right", no_wrap=True)
    step = math.ceil(len(rows) / _SHOWN)
    for row in [row for number, row in enumerate(rows, 1) if number % step == 0 or number == len(rows)]:
        table.add_row(
            str(row.version),
            seconds(row.virtual_h * 3600),
            seconds(row.round_s),
            str(row.updates),
            size(row.down_bytes),
            size(row.up_bytes),
            f"{row.wasted_share:.1%}",
            "" if row.loss is None else f"{row.loss:.4f}",
            *("" if name not in row.scores else f"{row.scores[name]:.4f}" for name in names),
        )
    return table

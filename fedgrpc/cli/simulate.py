"""`fedgrpc simulate`: a described fleet under the production round logic, to tune a policy before a rollout."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.view import piped_console, print_table, seconds, size
from fedgrpc.errors import UsageError
from fedgrpc.simulation.fleet import Fleet, Variant
from fedgrpc.simulation.fleet_result import FleetResult
from fedgrpc.simulation.fleet_run import FleetRun

_SHOWN_EACH_S: Final = 0.2
# In a child process: the shared array of each variant's progress.
_done: Any = None

LIMITS: Final = (
    "Modelled: reach, speed and link of each device, failed tasks, paused and resumed transfers, leases, "
    "deadlines, replacement, late updates. Not modelled: what is learned (Oort sees speed and counts of examples "
    "only), days and nights, links that devices share, limits of the aggregator, batteries."
)


def _run(**values: Any) -> None:
    hours, plot = values["hours"], values["plot"]
    described = read_fleet(values["fleet"])
    if plot is not None:
        check_plot(plot)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = [progress.add_task(variant.name, total=1.0) for variant in described.variants]

        def show(done: Sequence[float]) -> None:
            for number, part in zip(shown, done, strict=True):
                progress.update(number, completed=part)

        results = play(described, hours, values["seed"], values["jobs"], show)
    if plot is not None:
        plot_results(results, plot)
    if values["as_json"]:
        click.echo(json_text([result.to_json() for result in results]))
        return
    console = piped_console()
    print_table(console, results_table(described, hours, results))
    console.print()
    print_table(console, classes_table(results))
    _say(console, LIMITS)
    if plot is not None:
        _say(console, f"plot: {plot}")


def _say(console: Console, text: str) -> None:
    console.print()
    console.print(text, highlight=False, markup=False)


def read_fleet(path: Path) -> Fleet:
    """Read the fleet from a TOML file. Raises `UsageError`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        return Fleet.parse(document)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def play(
    fleet: Fleet, hours: float, seed: int, jobs: int, show: Callable[[Sequence[float]], None] = lambda done: None
) -> list[FleetResult]:
    """Simulate every variant on the same fleet, each in a child process; `show` takes the progress of each.

    The children end with this process, whatever ends it.
    """
    count = len(fleet.variants)
    done: Any = multiprocessing.Array("d", count)
    with multiprocessing.Pool(min(jobs, count), _begin, (done,)) as pool:
        work = [(index, fleet, variant, hours, seed) for index, variant in enumerate(fleet.variants)]
        playing = pool.map_async(_play_one, work, chunksize=1)
        while not playing.ready():
            playing.wait(_SHOWN_EACH_S)
            show(list(done))
        return playing.get()


def _begin(done: Any) -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _play_one(work: tuple[int, Fleet, Variant, float, int]) -> FleetResult:
    index, fleet, variant, hours, seed = work

    def note(part: float) -> None:
        _done[index] = part

    return FleetRun(fleet, variant, seed).run(hours * 3600, note)


def results_table(fleet: Fleet, hours: float, results: Sequence[FleetResult]) -> Table:
    """Return a table with one row per variant."""
    table = _table(f"{fleet.count} devices, {hours:g} virtual hours")
    headings = ("rounds\n/h", "abandoned", "round", "p95", "updates\n/h", "took\npart", "stale", "down/h", "up/h")
    for heading in (*headings, "wasted\nwork", "wasted\nbytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            f"{result.rounds_per_hour:.1f}",
            str(result.abandoned),
            seconds(result.round_s_median),
            seconds(result.round_s_p95),
            f"{result.updates / hours:.0f}",
            f"{result.took_part_share:.1%}",
            f"{result.stale_share:.0%}",
            size(result.down_bytes / hours),
            size(result.up_bytes / hours),
            f"{result.wasted_training_share:.1%}",
            f"{result.wasted_bytes_share:.1%}",
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    return table


def classes_table(results: Sequence[FleetResult]) -> Table:
    """Return the shares of devices that took part and of merged tasks, by variant and class."""
    table = _table("devices that took part / tasks that were merged")
    for line in results[0].classes:
        table.add_column(f"{line.name} ({line.devices})", justify="right")
    for result in results:
        shares = (f"{line.took_part_share:.0%} / {line.merged_share:.0%}" for line in result.classes)
        table.add_row(result.name, *shares)
    return table


def check_plot(path: Path) -> None:
    """Raise `UsageError` where `plot_results` would, before hours of simulation."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'fedgrpc[demo]'") from error
    mpl.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"cannot write the plot {path}: its name must end in one of .{', .'.join(sorted(formats))}"
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write the plot {path}: the folder {path.parent} cannot be written")


def plot_results(results: Sequence[FleetResult], path: Path) -> None:
    """Plot versions and participation over time, and the work. Raises `UsageError`."""
    check_plot(path)
    from matplotlib import pyplot as plt

    figure, (versions, part, work) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    for result in results:
        committed = [line.ended_at / 3600 for line in result.lines if line.committed]
        versions.step([0, *committed], range(len(committed) + 1), where="post", label=result.name)
        devices = sum(line.devices for line in result.classes)
        came = [at / 3600 for at in result.took_part_at]
        part.step([0, *came], [100 * n / devices for n in range(len(came) + 1)], where="post", label=result.name)
    names = [result.name for result in results]
    wasted = [result.trained_hours * result.wasted_training_share for result in results]
    merged = [result.trained_hours - lost for result, lost in zip(results, wasted, strict=True)]
    work.barh(names, merged, label="merged")
    work.barh(names, wasted, left=merged, label="wasted")
    work.invert_yaxis()
    versions.set(xlabel="hours", ylabel="versions", title="Rounds committed")
    part.set(xlabel="hours", ylabel="% of the devices", title="Devices that took part")
    work.set(xlabel="device hours of training", title="Work")
    for axes in (versions, part, work):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot {path}: {error}") from error
    finally:
        plt.close(figure)


_fleet = Declare("Simulation")
_show = Declare("What to show")

SETTINGS = [
    _fleet("--fleet", "TOML file that describes the fleet.", type=click.Path(path_type=Path), required=True),
    _fleet("--hours", "Virtual hours to simulate.", type=click.FloatRange(0, min_open=True), default=24.0),
    _fleet("--seed", "Seed; the same seed gives the same result.", type=click.IntRange(0), default=0),
    _fleet("--jobs", "Variants to simulate at the same time.", type=click.IntRange(1), default=2),
    _show("--plot", "Write a plot to this file.", type=click.Path(path_type=Path)),
    _show("--json/--table", "JSON, for programs.", name="as_json", default=False),
]

COMMAND = SettingsCommand(
    "simulate",
    _run,
    SETTINGS,
    "Simulate a fleet with the production round logic, to tune its policy before a rollout.",
)

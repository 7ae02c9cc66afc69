"""`fedgrpc simulate`: a described fleet under the production round logic, to tune a policy before a rollout."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedgrpc import toml
from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.options import AS_JSON, Declare, SettingsCommand
from fedgrpc.cli.values import read_file
from fedgrpc.cli.view import piped_console, print_table, progress_bar
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.plots import COLOURS, TEXT_PT, check_plot, legend_below, new_figure, save, styles
from fedgrpc.simulation.fleet import DescribedFleet, FleetVariant
from fedgrpc.simulation.fleet_result import FleetResult
from fedgrpc.simulation.fleet_run import FleetRun
from fedgrpc.words import seconds, size

_HOURS: Final = 24.0

# Index of its variant, and the process that simulates it.
Child = tuple[int, BaseProcess]

LIMITS: Final = (
    "Modelled: reach, speed and link of each device, failed tasks, paused and resumed transfers, leases, "
    "deadlines, replacement, late updates. Not modelled: what is learned (Oort sees speed and counts of examples "
    "only), days and nights, links that devices share, limits of the aggregator, batteries."
)


def _run(**values: Any) -> None:
    path, fleet = values["experiment"], values["fleet"]
    if (path is None) == (fleet is None):
        raise UsageError("name one file: an experiment with [learning], or a fleet with --fleet")
    if path is not None:
        if "learning" in read_file(path, toml.parse):
            # Learning needs the whole aggregator; rounds of numbers do not.
            from fedgrpc.cli.experiment import simulate_experiment

            simulate_experiment(path, values)
            return
        fleet = path
    _simulate_fleet(fleet, values)


def _simulate_fleet(path: Path, values: dict[str, Any]) -> None:
    hours, plot = values["hours"] or _HOURS, values["plot"]
    described = read_fleet(path)
    if plot is not None:
        check_plot(plot)
    with progress_bar(*Progress.get_default_columns()) as progress:
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


def read_fleet(path: Path) -> DescribedFleet:
    """Read the fleet from a TOML file. Raises `UsageError`."""
    return read_file(path, lambda text: DescribedFleet.parse(toml.parse(text)))


def play(
    fleet: DescribedFleet,
    hours: float,
    seed: int,
    jobs: int,
    show: Callable[[Sequence[float]], None] = lambda done: None,
) -> list[FleetResult]:
    """Simulate every variant on the same fleet, each in a child process; `show` takes the progress of each.

    The children end with this process, whatever ends it. Raises `FedgrpcError` when one ends too early.
    """
    done = [0.0] * len(fleet.variants)
    results: dict[int, FleetResult] = {}
    waiting = list(enumerate(fleet.variants))
    running: dict[Connection, Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, variant = waiting.pop(0)
                receiver, process = _start(fleet, variant, hours, seed)
                running[receiver] = index, process
            ready = set(wait(list(running)))
            for receiver in [each for each in running if each in ready]:
                index, process = running[receiver]
                told = _told(receiver, process, fleet.variants[index])
                if isinstance(told, FleetResult):
                    results[index] = told
                    del running[receiver]
                    process.join()
                else:
                    done[index] = told
                    show(done)
    finally:
        # Not terminate: a child has nothing to clean up, and Ctrl-C is to end at once.
        for _, process in running.values():
            process.kill()
    return [results[index] for index in sorted(results)]


def _start(
    fleet: DescribedFleet, variant: FleetVariant, hours: float, seed: int
) -> tuple[Connection, BaseProcess]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_play_one, args=(sender, fleet, variant, hours, seed), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _told(receiver: Connection, process: BaseProcess, variant: FleetVariant) -> float | FleetResult:
    """Return the progress of a child, 0 to 1, or its result."""
    try:
        told: float | FleetResult = receiver.recv()
    except EOFError:
        process.join()
        raise FedgrpcError(f"the simulation of {variant.name} ended with exit code {process.exitcode}") from None
    return told


def _play_one(sender: Connection, fleet: DescribedFleet, variant: FleetVariant, hours: float, seed: int) -> None:
    """Simulate one variant in a child process: Ctrl-C is the parent's business, and the child ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    sender.send(FleetRun(fleet, variant, seed).run(hours * 3600, sender.send))


def results_table(fleet: DescribedFleet, hours: float, results: Sequence[FleetResult]) -> Table:
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


def plot_results(results: Sequence[FleetResult], path: Path) -> None:
    """Plot versions and participation over time, and the work. Raises `UsageError`."""
    check_plot(path)
    figure, (versions, part, work) = new_figure(3, 14, 4.8)
    for result, (colour, _) in zip(results, styles(), strict=False):
        committed = [line.ended_at / 3600 for line in result.lines if line.committed]
        steps = {"where": "post", "label": result.name, "color": colour}
        versions.step([0, *committed], range(len(committed) + 1), **steps)
        devices = sum(line.devices for line in result.classes)
        came = [at / 3600 for at in result.took_part_at]
        part.step([0, *came], [100 * n / devices for n in range(len(came) + 1)], **steps)
    names = [result.name for result in results]
    wasted = [result.trained_hours * result.wasted_training_share for result in results]
    merged = [result.trained_hours - lost for result, lost in zip(results, wasted, strict=True)]
    work.barh(names, merged, label="merged", color=COLOURS[0])
    work.barh(names, wasted, left=merged, label="wasted", color=COLOURS[1], hatch="//", edgecolor="white")
    work.invert_yaxis()
    versions.set(xlabel="hours", ylabel="versions", title="Rounds committed")
    part.set(xlabel="hours", ylabel="% of the devices", title="Devices that took part")
    work.set(xlabel="device hours of training", title="Work")
    work.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=TEXT_PT)
    legend_below(figure, versions, 4)
    save(figure, path)


_fleet = Declare("Simulation")
_learning = Declare("Learning")
_show = Declare("What to show")

SETTINGS: list[click.Parameter] = [
    click.Argument(["experiment"], required=False, type=click.Path(path_type=Path, dir_okay=False)),
    _fleet("--fleet", "TOML file that describes a fleet that learns nothing.", type=click.Path(path_type=Path)),
    _fleet(
        "--hours",
        "Virtual hours to simulate; with [learning], without: until its run ends.",
        type=click.FloatRange(0, min_open=True),
        show_default=f"{_HOURS:g}",
    ),
    _fleet("--seed", "Seed; the same seed gives the same result.", type=click.IntRange(0), default=0),
    _fleet(
        "--jobs",
        "Variants to simulate at the same time; with [learning], processes that train.",
        type=click.IntRange(1),
        default=2,
    ),
    _learning(
        "--out",
        "Folder of all that the simulation makes.",
        type=click.Path(path_type=Path, file_okay=False),
        show_default="EXPERIMENT-simulated",
    ),
    _learning("--resume", "Go on with the simulation in that folder.", is_flag=True, default=False),
    _learning(
        "--engine",
        "Where clients train: inline, processes, ray; auto: processes if --jobs is more than one.",
        type=click.Choice(("auto", "inline", "processes", "ray")),
        default="auto",
    ),
    _show("--plot", "Write a plot to this file.", type=click.Path(path_type=Path)),
    AS_JSON,
]

COMMAND = SettingsCommand(
    "simulate",
    _run,
    SETTINGS,
    "Simulate an experiment, with learning or without: the production run under a virtual clock.",
)

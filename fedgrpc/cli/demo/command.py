"""`fedgrpc demo`: settings, screen, and the order of steps."""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedgrpc.claims import printable
from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.demo.federation import DemoSettings, Federation, PastFederation
from fedgrpc.cli.demo.processes import Processes, Scores, make_fleet, train_pooled
from fedgrpc.cli.demo.report import (
    DemoReport,
    make_report,
    plot_rounds,
    scores_table,
    traffic_line,
    training_rounds,
    verdict_line,
    workers_table,
)
from fedgrpc.cli.options import Declare, Setting, SettingsCommand, pick
from fedgrpc.cli.tables import task_table
from fedgrpc.cli.values import DURATION
from fedgrpc.cli.view import piped_console, print_table
from fedgrpc.codec.recipe import Recipe
from fedgrpc.datasets.partition import PARTITIONS
from fedgrpc.errors import ExtraMissing, UsageError
from fedgrpc.v1.aggregator_pb2 import Run
from fedgrpc.v1.round_pb2 import Round
from fedgrpc.words import round_line, scores
from fedgrpc.worker.task_loader import find_task, takes


class Screen:
    """A live table on a terminal, plain lines elsewhere; a context manager."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._console = console
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._rounds = self._progress.add_task("rounds", total=rounds)
        self._record: Round | None = None
        self._began_s = time.monotonic()

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, refresh_per_second=10, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def show(self, run: Run, record: Round) -> None:
        """Show a change of the run."""
        self._record = record
        committed = run.last.trained_rounds
        self._progress.update(self._rounds, completed=committed)
        self._refresh()

    def tell(self, remark: str) -> None:
        """Print a line that stays."""
        elapsed_s = time.monotonic() - self._began_s
        line = printable(f"{elapsed_s:5.1f} s  {remark}")
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def step(self, what: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """Show that one step of a long piece of work is done."""
        task = next((task for task in self._progress.tasks if task.description == what), None)
        number = self._progress.add_task(what, total=total) if task is None else task.id
        self._progress.update(number, completed=done)
        if done == total:
            self.tell(f"{what}: {scores(metrics)}")
        self._record = None
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        if self._record is None:
            return self._progress
        if not self._record.tasks:
            waiting = Text("waiting for the workers; loading PyTorch takes them a few seconds", style="dim")
            return Group(self._progress, waiting)
        return Group(self._progress, Text(round_line(self._record)), task_table(self._record))


_PARTITION: Final = "dirichlet:0.5"

_demo = Declare("The demo", DemoSettings)

SETTINGS: list[Setting] = [
    _demo("--task", "Learning task, as of `fedgrpc worker`.", metavar="REF"),
    _demo("--model", "Model name, where the task knows several.", metavar="NAME"),
    _demo("--data", "Folder of the task's data.", type=click.Path(path_type=Path, exists=True)),
    _demo("--workers", "Number of devices.", type=click.IntRange(1, 64)),
    _demo("--rounds", "Number of rounds.", type=click.IntRange(1)),
    _demo("--epochs", "Passes over a device's data in each round."),
    _demo(
        "--partition",
        f"Split of the data: {PARTITIONS}; without: {_PARTITION}, where the task takes one.",
        metavar="KIND",
    ),
    _demo("--encoding", "Recipe of models and updates, as in raw or int8+zstd.", metavar="RECIPE"),
    _demo(
        "--deadline",
        "Time that devices have to report in a round; without: learned from the devices, at least 6s.",
        name="deadline_s",
        type=DURATION,
    ),
    _demo("--straggler-round", "Round in which the first device hangs; 0: none."),
    _demo("--seed", "Seed of the partition, the model and the training."),
    _demo(
        "--out",
        "Folder for model.safetensors, rounds.json, rounds.png and logs/.",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("runs/demo"),
    ),
]


def _run(**values: Any) -> None:
    settings = pick(DemoSettings, values)
    Recipe.parse(settings.encoding)
    if importlib.util.find_spec("matplotlib") is None:
        raise ExtraMissing.of("the demo's plot", "demo")
    if settings.partition is None and takes(find_task(settings.task), "partition"):
        settings = replace(settings, partition=_PARTITION)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot use the folder {settings.out}: {error.strerror}") from error
    asyncio.run(_demo_in(settings))


async def _demo_in(settings: DemoSettings) -> None:
    console = piped_console()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedgrpc-demo-") as state:
        async with Processes(settings.out / "logs") as processes:
            with Screen(console, settings.rounds) as screen:
                history = await _federate(settings, processes, Path(state), screen)
                rounds = len(training_rounds(history.rounds))
                pooled = await _pool(settings, processes, rounds, screen)
    report = make_report(history.run, history.rounds, pooled, time.monotonic() - began_s)
    _write(settings.out, history, report)
    _print(console, settings, report)


async def _federate(settings: DemoSettings, processes: Processes, state: Path, screen: Screen) -> PastFederation:
    devices = make_fleet(settings.workers)
    screen.tell(f"starting one aggregator, {len(devices)} workers and an evaluator; logs in {processes.folder}")
    if settings.partition is None:
        screen.tell(f"{settings.task} takes no --partition: each device has all of its data")
    return await Federation(settings, devices, processes, state).run(screen.show, screen.tell)


async def _pool(settings: DemoSettings, processes: Processes, rounds: int, screen: Screen) -> list[Scores]:
    def step(done: int, scores: Scores) -> None:
        screen.step("pooled training", done, rounds, scores)

    return await train_pooled(processes, settings.task_arguments(), rounds, settings.epochs, step)


def _write(out: Path, history: PastFederation, report: DemoReport) -> None:
    (out / "model.safetensors").write_bytes(history.model)
    (out / "rounds.json").write_text(json_text(report.as_json()) + "\n")
    plot_rounds(report, out / "rounds.png")


def _print(console: Console, settings: DemoSettings, report: DemoReport) -> None:
    for table in (scores_table(report), workers_table(report)):
        console.print()
        print_table(console, table)
    console.print()
    shared = settings.partition or "each with all of the data"
    verdict = printable(f"{verdict_line(report)} ({shared}, {settings.workers} workers)")
    console.print(verdict, highlight=False, markup=False)
    console.print(f"{traffic_line(report.traffic)}, as {settings.encoding}", highlight=False)
    names = ", ".join(str(settings.out / name) for name in ("model.safetensors", "rounds.json", "rounds.png"))
    console.print(f"wrote {names} in {report.wall_s:.0f} s", highlight=False, soft_wrap=True)


COMMAND = SettingsCommand(
    "demo",
    _run,
    SETTINGS,
    "Train one model on five simulated devices: one aggregator and five workers, each its own process.",
)

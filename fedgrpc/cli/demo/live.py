"""What the demo shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedgrpc.claims import printable
from fedgrpc.cli.view import round_line, scores, task_table
from fedgrpc.v1.aggregator_pb2 import Run
from fedgrpc.v1.round_pb2 import Round


class Screen:
    """`with`: `show` a change of the run, `tell` a remark, `step` through a long piece of work."""

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
        """The run has changed."""
        self._record = record
        committed = run.last.trained_rounds
        self._progress.update(self._rounds, completed=committed)
        self._refresh()

    def tell(self, remark: str) -> None:
        """A line that stays."""
        elapsed_s = time.monotonic() - self._began_s
        line = printable(f"{elapsed_s:5.1f} s  {remark}")
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def step(self, what: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """One step of a long piece of work is done."""
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

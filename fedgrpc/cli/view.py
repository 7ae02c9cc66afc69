"""Consoles and tables of commands: wide in a pipe, where no line is cut. `fedgrpc.words` has what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import click
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from fedgrpc.claims import printable

# Wider than any line: lines in a pipe are neither cut nor wrapped.
_PIPE_COLUMNS = 10_000


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Return a bar on standard error that goes when it is done; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def told_when_stopped(way_on: str) -> Iterator[None]:
    """Say on standard error how to go on if Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"stopped; {way_on}", err=True)
        raise


def piped_console() -> Console:
    """Return a console as wide as its terminal; lines in a pipe or a file are never cut."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_COLUMNS)


def print_table(console: Console, table: RenderableType) -> None:
    """Print a table; in a pipe or a file without trailing blanks."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def time_text(stamp: Timestamp, form: str = "%Y-%m-%d %H:%M") -> str:
    """Format a time for people, in the zone of this machine."""
    return datetime.fromtimestamp(stamp.ToNanoseconds() / 1e9, UTC).astimezone().strftime(form)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    """Print a table, or, without rows, `nothing`."""
    if not rows:
        click.echo(nothing)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        # Text, and no markup: what peers say must not reach the terminal as anything else.
        table.add_row(*(Text(printable(cell)) for cell in row))
    print_table(piped_console(), table)

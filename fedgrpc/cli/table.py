"""Tables that fit where they are shown: on a narrow terminal whole columns go, and a quantity is never cut.

The rule: columns go by rank, the highest first, and the table says which. Notes have lines of their own. In a pipe
or a file nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.text import Text

from fedgrpc.claims import printable

_GAP = 2
_NOTE = "  └ "

Cell = str | Text


@dataclass(frozen=True)
class Column:
    """A heading, whether cells stand to the right, and its rank: 0 is never left out, the highest goes first."""

    heading: str
    right: bool = False
    rank: int = 0


class Table:
    """Rows of cells under columns, each with a note if it has one."""

    def __init__(self, *columns: Column) -> None:
        self._columns = columns
        self._rows: list[tuple[list[Text], str]] = []

    @property
    def row_count(self) -> int:
        """Rows, without the headings."""
        return len(self._rows)

    def add_row(self, *cells: Cell, note: str = "") -> None:
        """Add a row; cells that are missing at its end are empty. Text is shown as it is, never as markup, and has
        blanks for what a terminal would obey.
        """
        texts = [cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells]
        missing = len(self._columns) - len(texts)
        self._rows.append(([*texts, *(Text() for _ in range(missing))], printable(note)))

    def lines(self, width: int | None) -> Iterator[Text]:
        """The table as lines of at most `width` cells where that can be; None: as wide as it is."""
        widths = [
            max([len(column.heading), *(cells[index].cell_len for cells, _ in self._rows)])
            for index, column in enumerate(self._columns)
        ]
        shown = _fitting(self._columns, widths, width)
        yield self._line([Text(column.heading) for column in self._columns], shown, widths, "bold")
        for cells, note in self._rows:
            yield self._line(cells, shown, widths)
            if note:
                yield Text(_NOTE + note, style="dim")
        left_out = [self._columns[index].heading for index in range(len(widths)) if index not in shown]
        if left_out:
            yield Text(f"not shown for want of width: {', '.join(left_out)}", style="dim")

    def _line(self, cells: Sequence[Text], shown: Sequence[int], widths: Sequence[int], style: str = "") -> Text:
        line = Text(style=style)
        for index in shown:
            fill = " " * (widths[index] - cells[index].cell_len)
            line.append_text(
                Text(fill) + cells[index] if self._columns[index].right else cells[index] + Text(fill)
            )
            line.append(" " * _GAP)
        line.rstrip()
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width if console.is_terminal else None)


def _fitting(columns: Sequence[Column], widths: Sequence[int], width: int | None) -> list[int]:
    """Indices of the columns that are shown."""
    shown = list(range(len(columns)))
    if width is None:
        return shown
    going = sorted((index for index in shown if columns[index].rank), key=lambda index: -columns[index].rank)
    while going and sum(widths[index] + _GAP for index in shown) - _GAP > width:
        shown.remove(going.pop(0))
    return shown

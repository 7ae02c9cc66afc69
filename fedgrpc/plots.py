"""One look for every picture: colours, markers, and labels that cover nothing.

The rule: colours are those of Okabe and Ito, which colour-blind people tell apart, and each series has a marker of
its own besides. matplotlib is imported when a picture is asked for, and nothing of it is changed for others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import ExtraMissing, UsageError

# Black stands for text, and yellow is too light for a line.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS: Final = "osD^vPX*<>h"
TEXT_PT: Final = 9
# Dots per inch of what is written: fit for a page and for a screen of high resolution.
_DPI: Final = 130
# How far a label may be from its point, in points, and how much room it wants.
_LABEL_STEPS: Final = range(1, 30)
_LABEL_GAP_PT: Final = 1.5


def styles() -> Iterator[tuple[str, str]]:
    """Yield colours with markers, without end; two series look alike only after 77."""
    return zip(cycle(COLOURS), cycle(MARKERS), strict=False)


def check_plot(path: Path) -> None:
    """Raise `UsageError` where a picture could not be written, before hours of work."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ExtraMissing.of("a plot", "demo", error) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"cannot write the plot {path}: its name must end in one of .{', .'.join(sorted(formats))}"
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write the plot {path}: the folder {path.parent} cannot be written")


def new_figure(columns: int, width: float, height: float, **more: Any) -> tuple[Any, list[Any]]:
    """Return a figure of `width` by `height` inches, and its panels side by side. `more` goes to `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False, **more)[0])
    for panel in panels:
        panel.set_prop_cycle(color=COLOURS)
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=TEXT_PT)
    return figure, panels


def legend_below(figure: Any, panel: Any, columns: int = 3) -> None:
    """Put the legend of `panel` below all panels, where it covers no line."""
    handles, labels = panel.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=TEXT_PT)


def label_points(panel: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, where it covers no other name, no point and no edge.

    Call it last: the limits of the axes must be final. A name that finds no room is left out.
    """
    figure = panel.figure
    figure.canvas.draw()
    room = panel.get_window_extent()
    per_point = figure.dpi / 72
    places = {name: panel.transData.transform(point) for name, point in points.items()}
    taken = [_around(x, y, 4 * per_point) for x, y in places.values()]
    for name in sorted(places, key=lambda each: -places[each][1]):
        x, y = places[name]
        text = panel.annotate(name, points[name], (0, 0), textcoords="offset points", fontsize=TEXT_PT - 1)
        text.set_bbox({"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.3})
        size = text.get_window_extent()
        width, height = size.width, size.height
        for dx, dy in _offsets(width, height, per_point):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            inside = room.x0 <= box[0] and box[2] <= room.x1 and room.y0 <= box[1] and box[3] <= room.y1
            if inside and not any(_overlap(box, other, _LABEL_GAP_PT * per_point) for other in taken):
                text.set_position((dx / per_point, dy / per_point))
                taken.append(box)
                if abs(dy) > 2 * height or abs(dx) > width + 2 * height:
                    _leader(panel, points[name], (dx + width / 2, dy + height / 2), per_point)
                break
        else:
            text.remove()


def _offsets(width: float, height: float, per_point: float) -> Iterator[tuple[float, float]]:
    """Yield where the lower left corner of a label may be, seen from its point, from near to far."""
    beside = 6 * per_point
    for step in _LABEL_STEPS:
        reach = (step - 1) * height * 0.6
        for dy in (-height / 2 + reach, -height / 2 - reach):
            yield beside, dy
            yield -beside - width, dy
        yield -width / 2, beside + reach
        yield -width / 2, -beside - height - reach


def _leader(panel: Any, point: tuple[float, float], middle: tuple[float, float], per_point: float) -> None:
    """Draw a thin line from a point to its label."""
    panel.annotate(
        "",
        point,
        (middle[0] / per_point, middle[1] / per_point),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#999999", "shrinkA": 6},
        zorder=0,
    )


Box = tuple[float, float, float, float]


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _overlap(one: Box, other: Box, gap: float) -> bool:
    apart = one[2] + gap <= other[0] or other[2] + gap <= one[0]
    return not (apart or one[3] + gap <= other[1] or other[3] + gap <= one[1])


def save(figure: Any, path: Path) -> None:
    """Write the figure in the format that the name says. Raises `UsageError`."""
    try:
        figure.savefig(path, dpi=_DPI)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot {path}: {error}") from error

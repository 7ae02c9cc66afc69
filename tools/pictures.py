"""Draw the pictures of docs/images that follow from tables of the documentation.

    python -m tools.pictures                 # all; or name one: encodings, privacy, robust

The rule: a picture shows what its page's table says, so it is drawn again without measuring again. The benchmarks
draw their own results with the same functions.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrpc.plots import COLOURS, TEXT_PT, label_points, legend_below, new_figure, save, styles

DOCS = Path(__file__).resolve().parent.parent / "docs"
Row = Mapping[str, str]
ROBUST_FLEETS = ("iid, 20 workers", "dirichlet:0.5, 20 workers", "dirichlet:0.5, 50 workers")
# (epsilon, mean accuracy, its standard deviation)
Curve = Sequence[tuple[float, float, float]]


def rows_of(page: Path, first_heading: str) -> list[Row]:
    """Return the rows of the table whose first heading is that, as texts by heading."""
    found: list[Row] = []
    headings: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")] if line.startswith("|") else []
        if not cells:
            headings = []
        elif not headings and cells[0] == first_heading:
            headings = cells
        elif headings and not set(cells[0]) <= set("-: "):
            found.append(dict(zip(headings, cells, strict=True)))
    if not found:
        raise SystemExit(f"error: {page} has no table that begins with {first_heading!r}")
    return found


def number(text: str) -> float:
    """Return the first number of a cell, as 2.726 of '2.726 (6.0x)'."""
    found = re.match(r"[-+]?[\d.]+", text.replace(",", ""))
    if found is None:
        raise SystemExit(f"error: no number in {text!r}")
    return float(found.group())


def draw_encodings(points: Sequence[tuple[str, float, float, float]], path: Path) -> Any:
    """Draw (name, MB up a round, MB both ways, accuracy in percent), and return the figure."""
    figure, panels = new_figure(2, 15, 7.5)
    labels: list[dict[str, tuple[float, float]]] = []
    for panel, both_ways in zip(panels, (False, True), strict=True):
        mine = [each for each in points if each[0] == "float32" or (" / " in each[0]) == both_ways]
        shown = {_short(name): (both if both_ways else up, accuracy) for name, up, both, accuracy in mine}
        for name, point in shown.items():
            fed_back = " EF" in name
            panel.plot(*point, "^" if fed_back else "o", color=COLOURS[1 if fed_back else 0], markersize=6)
        panel.axhline(points[0][3], color="#555555", linewidth=0.7, zorder=0)
        way = "both ways" if both_ways else "up"
        panel.set(
            xscale="log", xlabel=f"MB {way} a round, ten workers", ylabel="accuracy, %", title=f"Bytes {way}"
        )
        panel.margins(x=0.16, y=0.12)
        labels.append(shown)
    for place, label in enumerate(("without error feedback", "with error feedback (EF)")):
        panels[0].plot([], [], "o^"[place], color=COLOURS[place], label=label)
    legend_below(figure, panels[0])
    for panel, shown in zip(panels, labels, strict=True):
        label_points(panel, shown)
    save(figure, path)
    return figure


def _short(name: str) -> str:
    return name.replace("+zstd", "").replace("rounding=", "")


def draw_privacy(curves: Mapping[str, Curve], plain: float, delta: float, path: Path) -> None:
    """Draw accuracy over epsilon, with one standard deviation, beside the same without noise."""
    figure, (panel,) = new_figure(1, 7.5, 4.8)
    epsilons = [epsilon for epsilon, _, _ in next(iter(curves.values()))]
    for (name, curve), (colour, marker) in zip(curves.items(), styles(), strict=False):
        _, mean, spread = zip(*curve, strict=True)
        panel.errorbar(epsilons, mean, spread, color=colour, marker=marker, markersize=5, capsize=2, label=name)
    panel.axhline(plain, color="#555555", linestyle="--", linewidth=1, label="clipped, without noise")
    panel.set(xscale="log", xlabel=f"epsilon at delta {delta:g}", ylabel="accuracy on held-out images")
    panel.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    panel.minorticks_off()
    panel.legend(loc="lower right", frameon=False, fontsize=TEXT_PT)
    save(figure, path)


def draw_robust(fleets: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the accuracy of each rule under each attack of a fifth of the devices, a panel for each fleet."""
    figure, panels = new_figure(len(fleets), 4.6 * len(fleets), 4.8, sharey=True)
    for panel, (name, rows) in zip(panels, fleets.items(), strict=True):
        rules = list(rows[0])[2:]
        shown = [row for row in rows if row[name] == "20%"]
        for row, (colour, marker) in zip(shown, styles(), strict=False):
            accuracies = [number(row[rule]) for rule in rules]
            panel.plot(rules, accuracies, marker, color=colour, markersize=6, label=row["attack"])
        panel.axhline(
            number(rows[0]["mean"]), color="#555555", linestyle="--", linewidth=1, label="mean, no attack"
        )
        panel.set(title=name)
        panel.tick_params(axis="x", labelrotation=60)
    panels[0].set(ylabel="accuracy on held-out images, %")
    legend_below(figure, panels[0], 6)
    save(figure, path)


def _robust(path: Path) -> None:
    page = DOCS / "measurements" / "robust.md"
    draw_robust({name: rows_of(page, name) for name in ROBUST_FLEETS}, path)


def _encodings(path: Path) -> None:
    rows = rows_of(DOCS / "transport.md", "encoding (up / down)")
    draw_encodings(
        [
            (
                row["encoding (up / down)"],
                number(row["up MB/round (fewer)"]),
                number(row["both (fewer)"]),
                number(row["accuracy"]),
            )
            for row in rows
        ],
        path,
    )


def _privacy(path: Path) -> None:
    page = DOCS / "measurements" / "privacy.md"
    plain = re.search(r"Clipped and without noise: ([\d.]+\d)", page.read_text(encoding="utf-8"))
    if plain is None:
        raise SystemExit(f"error: {page} does not say what is reached without noise")
    curves: dict[str, Curve] = {}
    for row in rows_of(page, "epsilon"):
        name, *cells = row.items()
        curves[name[1]] = [(float(epsilon), *_mean_and_spread(text)) for epsilon, text in cells]
    draw_privacy(curves, float(plain.group(1)), 1e-4, path)


def _mean_and_spread(text: str) -> tuple[float, float]:
    """Return both numbers of a cell; of one seed there is no spread."""
    mean, _, spread = text.partition("±")
    return float(mean), float(spread or 0)


PICTURES: Mapping[str, Callable[[Path], None]] = {
    "encodings": _encodings,
    "privacy": _privacy,
    "robust": _robust,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*PICTURES, []], help="which; without: all")
    parser.add_argument("--to", type=Path, default=DOCS / "images", help="folder to write to")
    arguments = parser.parse_args()
    for name in arguments.name or PICTURES:
        PICTURES[name](arguments.to / f"{name}.png")
        print(arguments.to / f"{name}.png")


if __name__ == "__main__":
    main()

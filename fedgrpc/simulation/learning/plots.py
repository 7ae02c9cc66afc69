"""Plots of simulations: scores over virtual time and bytes with bands over seeds, and what is worth its bytes.

The rule: colours are those of Okabe and Ito, which colour-blind people tell apart, and each line has a marker of
its own besides. Nothing here is needed to simulate: matplotlib is imported when a plot is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedgrpc.errors import ExtraMissing, UsageError
from fedgrpc.simulation.learning.versions import VersionRow

# Black stands for text, and yellow is too light for a line.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS: Final = "osD^vPX*<>"
# Student's t for a 95 % interval, by the number of seeds.
_T95: Final = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
_POINTS: Final = 200
_MB: Final = 1e6

Cost = Callable[[VersionRow], float]


@dataclass(frozen=True)
class Curve:
    """Runs of one setting, one for each seed."""

    label: str
    runs: tuple[Sequence[VersionRow], ...]


@dataclass(frozen=True)
class Band:
    """Mean score of some runs at the costs `x`, and how far a 95 % interval reaches; 0 with one run."""

    x: np.ndarray
    mean: np.ndarray
    reach: np.ndarray


def band_of(runs: Sequence[Sequence[VersionRow]], cost: Cost) -> Band | None:
    """Return the band of the runs where all of them have a score; None where there is no such place.

    Runs have their versions at other costs each, so between versions scores are interpolated.
    """
    scored = [[(cost(row), row.score) for row in run if row.score is not None] for run in runs]
    if not scored or not all(scored):
        return None
    first, last = max(run[0][0] for run in scored), min(run[-1][0] for run in scored)
    if last < first:
        return None
    # A single run is drawn as it is.
    x = np.array([each for each, _ in scored[0]]) if len(scored) == 1 else np.linspace(first, last, _POINTS)
    values = [np.interp(x, *np.array(run, dtype=np.float64).T) for run in scored]
    mean = np.mean(values, axis=0)
    if len(values) == 1:
        return Band(x, mean, np.zeros_like(mean))
    t = _T95.get(len(values), 1.96)
    return Band(x, mean, t * np.std(values, axis=0, ddof=1) / np.sqrt(len(values)))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, score) that no other beats in both, cheapest first."""
    front: list[int] = []
    best = -np.inf
    for index in sorted(range(len(points)), key=lambda each: (points[each][0], -points[each][1])):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def check_plot(path: Path) -> None:
    """Raise `UsageError` where a plot could not be written, before hours of simulation."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ExtraMissing.of("a plot", "demo", error) from error
    mpl.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"cannot write the plot {path}: its name must end in one of .{', .'.join(sorted(formats))}"
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write the plot {path}: the folder {path.parent} cannot be written")


def plot_curves(curves: Sequence[Curve], path: Path, score: str = "accuracy on held-out data") -> None:
    """Plot scores over virtual time and bytes, and the settings by score and bytes. Raises `UsageError`."""
    check_plot(path)
    from matplotlib import pyplot as plt

    # Many settings need rows in the legend, and get them: a legend over the lines hides them.
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(1, 3 if len(curves) > 1 else 2, figsize=(14 if len(curves) > 1 else 9.5, 4.6))
    unit, per_hour = _time_unit(curves)
    for curve, (colour, marker) in zip(curves, _styles(), strict=False):
        _draw(axes[0], curve, lambda row: row.virtual_h * per_hour, colour, marker)
        _draw(axes[1], curve, _bytes, colour, marker)
    # Bands of few seeds may leave the range of any score: what they are around is to be seen.
    scores = [row.score for curve in curves for run in curve.runs for row in run if row.score is not None]
    if scores:
        margin = 0.05 * (max(scores) - min(scores)) or 0.01
        for each in axes[:2]:
            each.set_ylim(min(scores) - margin, max(scores) + margin)
    axes[0].set(xlabel=f"virtual {unit}", ylabel=score, title="Score over time")
    axes[1].set(xlabel="MB up and down, all devices", ylabel=score, title="Score over bytes")
    if len(curves) > 1:
        _draw_front(axes[2], curves)
        axes[2].set(xlabel="MB up and down, all devices", ylabel=f"last {score}", title="Worth its bytes")
    for each in axes:
        each.grid(alpha=0.3)
        each.margins(x=0.03)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(curves) > 1:
        figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0.055 * rows + 0.02 if len(curves) > 1 else 0, 1, 1))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot {path}: {error}") from error
    finally:
        plt.close(figure)


def _time_unit(curves: Sequence[Curve]) -> tuple[str, float]:
    """Return the unit of a readable axis of time, and how many of it make an hour."""
    hours = max((run[-1].virtual_h for curve in curves for run in curve.runs if run), default=0.0)
    if hours < 0.1:
        return "seconds", 3600.0
    return ("minutes", 60.0) if hours < 3 else ("hours", 1.0)


def _styles() -> Any:
    return zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)


def _bytes(row: VersionRow) -> float:
    return (row.down_bytes + row.up_bytes) / _MB


def _draw(axes: Any, curve: Curve, cost: Cost, colour: str, marker: str) -> None:
    band = band_of(curve.runs, cost)
    if band is None:
        # In the legend all the same: nobody wonders where it is.
        axes.plot([], [], color=colour, marker=marker, label=f"{curve.label} (no scores)")
        return
    label = curve.label if len(curve.runs) == 1 else f"{curve.label} ({len(curve.runs)} seeds)"
    every = max(1, band.x.size // 8)
    axes.plot(band.x, band.mean, color=colour, marker=marker, markevery=every, markersize=5, lw=1.6, label=label)
    if band.reach.any():
        axes.fill_between(band.x, band.mean - band.reach, band.mean + band.reach, color=colour, alpha=0.15, lw=0)


def _draw_front(axes: Any, curves: Sequence[Curve]) -> None:
    points: list[tuple[float, float]] = []
    for curve, (colour, marker) in zip(curves, _styles(), strict=False):
        ends = [(_bytes(run[-1]), _last_score(run)) for run in curve.runs if run]
        known = [(cost, score) for cost, score in ends if score is not None]
        if not known:
            continue
        cost, score = np.mean(known, axis=0)
        points.append((float(cost), float(score)))
        axes.plot(cost, score, color=colour, marker=marker, markersize=8, ls="")
    front = [points[index] for index in pareto_front(points)]
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="#555555", lw=1, ls=":", zorder=0)


def _last_score(run: Sequence[VersionRow]) -> float | None:
    return next((row.score for row in reversed(run) if row.score is not None), None)

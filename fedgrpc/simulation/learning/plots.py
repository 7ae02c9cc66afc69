"""Plots of simulations: scores over virtual time and bytes with bands over seeds, and what is worth its bytes.

The rule: nothing here is needed to simulate. The look is that of `fedgrpc.plots`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedgrpc.plots import check_plot as check_plot
from fedgrpc.plots import legend_below, new_figure, save, styles
from fedgrpc.simulation.learning.versions import VersionRow

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


def plot_curves(curves: Sequence[Curve], path: Path, score: str = "accuracy on held-out data") -> None:
    """Plot scores over virtual time and bytes, and the settings by score and bytes. Raises `UsageError`."""
    check_plot(path)
    several = len(curves) > 1
    figure, axes = new_figure(3 if several else 2, 14 if several else 9.5, 5.0 if several else 4.4)
    unit, per_hour = _time_unit(curves)
    for curve, (colour, marker) in zip(curves, styles(), strict=False):
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
        each.margins(x=0.03)
    if several:
        # Many settings need rows in the legend, and get them: a legend over the lines hides them.
        legend_below(figure, axes[0], min(3, len(curves)))
    save(figure, path)


def _time_unit(curves: Sequence[Curve]) -> tuple[str, float]:
    """Return the unit of a readable axis of time, and how many of it make an hour."""
    hours = max((run[-1].virtual_h for curve in curves for run in curve.runs if run), default=0.0)
    if hours < 0.1:
        return "seconds", 3600.0
    return ("minutes", 60.0) if hours < 3 else ("hours", 1.0)


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
    for curve, (colour, marker) in zip(curves, styles(), strict=False):
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

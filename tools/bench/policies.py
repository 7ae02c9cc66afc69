"""Table and plot of the forty policies (docs/measurements/policies.md), from the table of a sweep.

    fedgrpc sweep examples/policies/grid.toml --out policies
    python -m tools.bench.policies policies/sweep.csv --plot docs/images/policies.png

Scores change from version to version, so that each is the mean of the last three that were taken by then.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from fedgrpc.simulation.learning.plots import pareto_front

AXES = ("encoding", "deadline", "plan")
_SCORES = 3


@dataclass(frozen=True)
class Outcome:
    """One policy. Accuracies from 0 to 1, NaN where no version was scored by then."""

    choices: tuple[str, ...]
    by_time: float
    by_bytes: float
    megabytes: float
    versions: int
    wasted_share: float


def main() -> None:
    """Print the tables, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="sweep.csv")
    parser.add_argument("--megabytes", type=float, default=40.0, help="the budget of bytes, down and up")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    outcomes = outcomes_of(args.table, args.megabytes)
    print(f"| {' | '.join(AXES)} | 24 h | {args.megabytes:g} MB | MB in 24 h | versions | wasted |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in sorted(outcomes, key=lambda each: -each.by_time):
        print(
            f"| {' | '.join(each.choices)} | {_percent(each.by_time)} | {_percent(each.by_bytes)} "
            f"| {each.megabytes:.0f} | {each.versions} | {each.wasted_share:.0%} |"
        )
    for place, axis in enumerate(AXES):
        print(
            f"\n| {axis} | 24 h | {args.megabytes:g} MB | MB in 24 h | wasted |\n| --- | --- | --- | --- | --- |"
        )
        for choice, those in _grouped(outcomes, place).items():
            print(
                f"| {choice} | {_mean(those, lambda each: 100 * each.by_time):.1f} "
                f"| {_mean(those, lambda each: 100 * each.by_bytes):.1f} "
                f"| {_mean(those, lambda each: each.megabytes):.0f} "
                f"| {_mean(those, lambda each: each.wasted_share):.0%} |"
            )
    if args.plot:
        plot(outcomes, args.plot)


def outcomes_of(table: Path, megabytes: float) -> list[Outcome]:
    """Return one outcome for each point of the sweep."""
    points: dict[str, list[dict[str, str]]] = defaultdict(list)
    with table.open() as file:
        for row in csv.DictReader(file):
            points[row["point"]].append(row)
    return [_outcome(rows, megabytes) for rows in points.values()]


def _outcome(rows: Sequence[dict[str, str]], megabytes: float) -> Outcome:
    last = rows[-1]
    within = [row for row in rows if _megabytes(row) <= megabytes]
    return Outcome(
        tuple(last[axis] for axis in AXES),
        _score(rows),
        _score(within),
        _megabytes(last),
        int(last["version"]),
        float(last["wasted_share"]),
    )


def _megabytes(row: dict[str, str]) -> float:
    return (int(row["down_bytes"]) + int(row["up_bytes"])) / 1e6


def _score(rows: Sequence[dict[str, str]]) -> float:
    scores = [float(row["eval_accuracy"]) for row in rows if row["eval_accuracy"]]
    return mean(scores[-_SCORES:]) if scores else float("nan")


def _grouped(outcomes: Sequence[Outcome], place: int) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = defaultdict(list)
    for each in outcomes:
        found[each.choices[place]].append(each)
    return found


def _mean(outcomes: Sequence[Outcome], of: Callable[[Outcome], float]) -> float:
    return mean(map(of, outcomes))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw accuracy after 24 hours over bytes: a colour for each deadline rule, a mark for each encoding."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    encodings, deadlines = list(_grouped(outcomes, 0)), list(_grouped(outcomes, 1))
    for each in outcomes:
        encoding, deadline, plan = each.choices
        colour = f"C{deadlines.index(deadline)}"
        axes.scatter(
            each.megabytes,
            100 * each.by_time,
            s=55,
            marker="osD^"[encodings.index(encoding) % 4],
            edgecolors=colour,
            facecolors=colour if plan == "whole" else "none",
        )
    front = [outcomes[index] for index in pareto_front([(each.megabytes, each.by_time) for each in outcomes])]
    front.sort(key=lambda each: each.megabytes)
    axes.plot([each.megabytes for each in front], [100 * each.by_time for each in front], "k:", lw=1)
    for number, deadline in enumerate(deadlines):
        axes.scatter([], [], color=f"C{number}", label=f"deadline: {deadline}")
    for number, encoding in enumerate(encodings):
        axes.scatter([], [], color="grey", marker="osD^"[number % 4], label=f"encoding: {encoding}")
    axes.scatter([], [], edgecolors="grey", facecolors="none", label="small devices train half")
    axes.set(
        xscale="log", xlabel="MB in 24 virtual hours, down and up", ylabel="accuracy after 24 virtual hours, %"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

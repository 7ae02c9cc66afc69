"""Cost curves: what a round takes against the number of updates, against parameters, and against rounds, as plots.

    python -m tools.bench.curves workers --of 4,32,250,1000,2000 --plot docs/images/scale_workers.png
    python -m tools.bench.curves parameters --of 100000,1000000,25000000 --plot docs/images/scale_parameters.png
    python -m tools.bench.curves rounds --rows growth.json --plot docs/images/scale_rounds.png

Points are measured by `tools.bench.load`, each by an aggregator of its own. With `--rows` they are read from a
file that an earlier run, or `tools.bench.growth`, has written with `--json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

# Of each curve: the axis, its field, and the panels, each with its field and title.
_PANELS = {
    "workers": (
        "updates a round",
        "updates_a_round",
        (
            ("round_s", "seconds a round"),
            ("cpu_ms_per_update", "CPU of the aggregator, ms an update"),
            ("rss_mib", "RSS, MiB"),
        ),
    ),
    "parameters": (
        "parameters",
        "parameters",
        (
            ("round_s", "seconds a round of 4 updates"),
            ("cpu_ms_per_update", "CPU of the aggregator, ms an update"),
            ("rss_mib", "RSS, MiB"),
        ),
    ),
    "rounds": (
        "rounds so far",
        "rounds",
        (
            ("cpu_ms", "CPU of the aggregator, ms a round"),
            ("rss_mib", "RSS, MiB"),
            ("database_kib", "database, KiB"),
        ),
    ),
}


def point(curve: str, number: int, words: list[str]) -> dict[str, Any]:
    """Measure one point: as many updates a round, or 4 updates of a model with as many parameters."""
    updates = number if curve == "workers" else 4
    sizes = ["--workers", str(updates + 1), "--updates", str(updates), "--probes", "1", "--train-s", "0.5"]
    if curve == "parameters":
        sizes += ["--parameters", str(number)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "tools.bench.load", *sizes, *words, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        row: dict[str, Any] = json.loads(path.read_text())[0]
    return {**row, curve: number} if curve == "parameters" else row


def draw(curve: str, rows: Rows, path: Path) -> None:
    """Write the plot of a curve."""
    from matplotlib.figure import Figure

    axis, field, panels = _PANELS[curve]
    figure = Figure(figsize=(10.5, 3.0), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot([row[field] for row in rows], [row[name] for row in rows], "o-", color="#2a6f97", markersize=4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(axis, fontsize=9)
        axes.set_ylim(0, 1.1 * max(row[name] for row in rows))
        if curve != "rounds":
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)


def show(curve: str, rows: Rows) -> None:
    """Print the rows as a table of Markdown."""
    axis, field, panels = _PANELS[curve]
    print(f"| {axis} | " + " | ".join(title for _, title in panels) + " |")
    print("| --: " * (1 + len(panels)) + "|")
    for row in rows:
        print(f"| {row[field]:,} | " + " | ".join(f"{row[name]:,.4g}" for name, _ in panels) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", choices=sorted(_PANELS))
    parser.add_argument("--of", default="", help="the points, a list of counts")
    parser.add_argument("--rows", type=Path, help="read the points from this file")
    parser.add_argument("--json", type=Path, help="write the points to this file, too")
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    options, words = parser.parse_known_args()
    if options.rows is None and (options.curve == "rounds" or not options.of):
        parser.error("give the points by --of or --rows; those of rounds come from tools.bench.growth")
    rows: Rows = [] if options.rows is None else json.loads(options.rows.read_text())
    for number in map(int, filter(None, options.of.split(","))):
        rows += [point(options.curve, number, words)]
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        draw(options.curve, rows, options.plot)
    show(options.curve, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One simulation that learns, from its experiment to its versions. A folder holds all that it has made."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import UsageError
from fedgrpc.simulation.learning.asked import as_read, check_same, read_json, write_json
from fedgrpc.simulation.learning.engines import running_engine
from fedgrpc.simulation.learning.experiment import Experiment
from fedgrpc.simulation.learning.history import RoundRow
from fedgrpc.simulation.learning.run import LearningRun
from fedgrpc.simulation.learning.versions import VersionRow, version_rows
from fedgrpc.storage.folder import hold_folder

IN_USE: Final = "is used by another simulation"
VERSIONS: Final = "versions.csv"
_EXPERIMENT: Final = "experiment.json"
# When a run ends, and what is told of it, changes no round.
_MAY_CHANGE: Final = frozenset(
    f"aggregator.{name}" for name in ("rounds", "target", "target_metric", "patience", "track", "keep_rounds")
)

# Hears each round, and which part of the simulation is done, 0 to 1.
Show = Callable[[RoundRow, float], None]


def play(
    experiment: Experiment,
    out: Path,
    *,
    seed: int = 0,
    jobs: int = 1,
    engine: str = "auto",
    hours: float | None = None,
    resume: bool = False,
    show: Show = lambda row, part: None,
) -> list[VersionRow]:
    """Play an experiment in the folder `out`, and return its versions, which `versions.csv` there has, too.

    `hours` are virtual; None: until the run ends. `jobs` processes train. With `resume` the folder may hold a part
    of the simulation, which goes on; without, `UsageError`, and also for other settings. Raises as the parts do.
    """
    if (out / "history.jsonl").exists() and not resume:
        raise UsageError(f"{out} holds a simulation: go on with --resume, or name another folder with --out")
    with hold_folder(out, IN_USE), running_engine(engine, experiment, jobs) as running:
        run = LearningRun(experiment, out, running, seed)
        _take_settings(out, experiment, begun=bool(run.history.rows))
        rows = version_rows(run.run(math.inf if hours is None else hours, show))
    (out / VERSIONS).write_text(as_csv([row.to_dict() for row in rows]))
    return rows


def _take_settings(out: Path, experiment: Experiment, begun: bool) -> None:
    """Note what the folder is played with. Raises `UsageError` where it has begun with something else."""
    path, asked = out / _EXPERIMENT, as_read(experiment.document)
    # A folder of an earlier version has no such file.
    if begun and (before := read_json(path)) is not None:
        check_same(out, before, asked, "the experiment", _MAY_CHANGE)
    write_json(path, asked)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table; a column that a row lacks is empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))

"""Runs in the data folder of an aggregator that does not answer, for commands that then read the folder itself."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from fedgrpc.aggregator.run_files import RUNS
from fedgrpc.errors import NotFound, UsageError
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.run_store import RunStore


def stored_runs(folder: Path) -> dict[str, Path]:
    """Return the folder of each run in a data folder by the run's name; its own comes first.

    Raises `UsageError` for a folder that is not an aggregator's or holds no run, and `StorageError`.
    """
    if not (folder / DATABASE).exists():
        raise UsageError(f"{folder} is not an aggregator's data folder: it has no {DATABASE}")
    with storage_errors(folder, "read"):
        places = [folder, *sorted((folder / RUNS).glob(f"*/{DATABASE}"))]
    found = {}
    for place in (path.parent if path.name == DATABASE else path for path in places):
        with closing(RunStore(place / DATABASE, read_only=True)) as store:
            run = store.run()
        if run is not None:
            found[run.name] = place
    if not found:
        raise UsageError(f"the data folder {folder} holds no run yet")
    return found


def find_run(folder: Path, name: str = "") -> Path:
    """Return the folder of a run; without a name: of the run that the folder was started with, or of its only one.

    Raises `NotFound` for an unknown name, `UsageError` where a name is missing, and as `stored_runs`.
    """
    runs = stored_runs(folder)
    if name:
        if name not in runs:
            raise NotFound(
                f"the data folder {folder} has no run {name[:80]!r}: name one of {', '.join(sorted(runs))}"
            )
        return runs[name]
    first = next(iter(runs.values()))
    if first != folder and len(runs) > 1:
        raise UsageError(f"the data folder {folder} holds {len(runs)} runs: name one of {', '.join(sorted(runs))}")
    return first
